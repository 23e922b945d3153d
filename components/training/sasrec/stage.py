"""The `train_sasrec` stage: the baseline that the generative recommender has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from components.pipeline.stage import Inputs, Outputs, Run, stage
from components.training.sasrec.config import SasrecParams

if TYPE_CHECKING:
    from components.pipeline.actor_pool import RunJobs


class TrainSasrecParams(SasrecParams):
    """Full-softmax SASRec, tuned on validation."""


@stage(
    inputs=("catalogue", "train_sequences", "valid_examples"),
    outputs=("sasrec",),
    params=TrainSasrecParams,
)
def train_sasrec(
    params: TrainSasrecParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Tunes and trains full-softmax SASRec, the baseline to beat."""
    import numpy as np

    from components.pipeline.errors import DataContractError
    from components.training.sasrec.data import read_sequences
    from components.training.sasrec.train import search

    columns = ["item_index", "positive"]
    train = read_sequences(inputs["train_sequences"].batches(columns), params.events_per_user)
    if params.targets == "positive" and not train.positive_E.any():
        raise DataContractError(
            "no train event is positive",
            where="artifact 'train_sequences'",
            remedy="set train_sasrec.targets: all",
        )
    examples = inputs["valid_examples"].read_table([*columns, "target"])
    if len(examples) > params.valid_users:
        examples = examples.take(
            np.arange(params.valid_users) * len(examples) // params.valid_users
        )
    valid = read_sequences(examples.select(columns).to_batches(), params.max_length)
    target_U = examples["target"].to_numpy()
    items = inputs["catalogue"].rows or 0
    data = {"params": params, "train": train, "valid": valid, "valid_target_U": target_U}
    with trainers(params, data) as trained, run.progress(1.0, "search") as bar:
        done = 0.0

        def log(metrics: dict[str, float], epochs: int) -> None:
            nonlocal done
            share = metrics.pop("progress")
            run.log(metrics, epochs)
            bar.advance(share - done)
            done = share

        found = search(
            params,
            items,
            train,
            valid,
            target_U,
            run.seed,
            log,
            checkpoints=run.checkpoints.fetch("candidates"),
            keep=run.checkpoints.keep,
            run=trained,
        )
    best = found.best
    if found.cut_short:
        run.note(
            f"the search was cut off after {params.max_minutes:g} minutes: its result depends on "
            "the speed of this machine; raise max_minutes or make the grid smaller"
        )
    outputs["sasrec"].save_state_dict(best.best_state)
    outputs["sasrec"].write_json(best.model.config.model_dump(mode="json"), "config.json")
    outputs["sasrec"].write_json(
        {
            "chosen": best.number,
            "cut_short": found.cut_short,
            "candidates": [
                {
                    "learning_rate": c.learning_rate,
                    "dropout": c.model.config.dropout,
                    "width": c.model.config.width,
                    "tied": c.model.config.tied,
                    "epochs": c.epoch,
                    "best_epoch": c.best_epoch,
                    "valid_ndcg_at_10": c.best_score,
                    "curve": c.curve,
                }
                for c in found.candidates
            ],
        }
    )
    return {
        "valid_ndcg_at_10": best.best_score,
        "candidates": float(len(found.candidates)),
        "epochs": float(sum(c.epoch for c in found.candidates)),
        "cut_short": float(found.cut_short),
        "parameters": float(sum(p.numel() for p in best.model.parameters())),
    }


@contextmanager
def trainers(params: SasrecParams, data: dict[str, Any]) -> Iterator[RunJobs]:
    """What trains the candidates: one process, this one, or as many as there are workers."""
    import torch

    from components.pipeline.actor_pool import actor_pool, in_turn
    from components.training.sasrec.train import Trainer

    data = {**data, "threads": params.threads}
    workers = min(params.workers, len(params.grid.cells()))
    if workers > 1:
        with actor_pool(Trainer, data, concurrency=workers, cpus_per_actor=params.threads) as run:
            yield run
        return
    threads = torch.get_num_threads()
    try:
        yield in_turn(Trainer(**data))
    finally:
        torch.set_num_threads(threads)
