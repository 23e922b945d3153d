"""The `train_reward_model` stage: preference models from real feedback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from components.pipeline.cpu_threads import cpu_threads
from components.pipeline.params_base import Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage
from components.training.onerec.reward.config import PScoreConfig

if TYPE_CHECKING:
    from components.training.onerec.reward.pscore_measure import Measured

#: A reward of one label would be a click model under another name.
MIN_OBJECTIVES = 2
#: The two models of the artifact: what trains the recommender, and what judges it.
REWARD, JUDGE = "reward", "judge"


class TrainRewardModelParams(PScoreConfig):
    """The preference models and their training."""

    seed: Seed = Field(0, description="split of users, weights, order of exposures, the search")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads; others give other last bits")
    gpu: bool = Field(False, description="train on a GPU")


@stage(
    inputs=("catalogue", "items", "users", "interactions", "train_sequences", "item_embedding"),
    outputs=("reward_model",),
    params=TrainRewardModelParams,
    gpus=lambda params: int(params.gpu),
)
def train_reward_model(
    params: TrainRewardModelParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Trains two preference models (P-Score) on the feedback of disjoint users."""
    import numpy as np

    from components.training.onerec.reward.exposures import divide
    from components.training.onerec.reward.features import split_users
    from components.training.onerec.reward.pscore import PScore, save_pscore
    from components.training.onerec.reward.pscore_finished import Finished
    from components.training.onerec.reward.pscore_measure import measure_pscore
    from components.training.onerec.reward.pscore_train import train_pscore

    exposures, user_ids = _exposures(inputs, params)
    told = outputs["reward_model"]
    groups = split_users(user_ids, params.held_out_share, run.seed)
    material = divide(exposures, {name: groups[name] for name in (REWARD, JUDGE)}, params)
    objectives = material.objectives
    names = tuple(exposures.labels.names[o] for o in objectives)
    if len(objectives) < MIN_OBJECTIVES:
        run.note(
            f"the source has too few kinds of feedback to learn a preference from "
            f"({', '.join(names) or 'none'} with {params.min_labels} labels of both kinds by the "
            f"users of each of two models): the recommender stays as it is"
        )
        told.write_json({"objectives": []})
        return {"objectives": 0.0}
    device = "cuda" if params.gpu else "cpu"
    finished = Finished(run.checkpoints)
    metrics: dict[str, float] = {"objectives": float(len(objectives))}
    facts: dict[str, Any] = {"split_seed": run.seed, "held_out_share": params.held_out_share}
    with run.progress(2.0, "preference models") as bar, cpu_threads(params.threads):
        for number, (name, own) in enumerate(material.cuts.items()):
            done = 0.0

            def advance(share: float) -> None:
                nonlocal done
                bar.advance(share - done)
                done = share

            model = finished.load(name, lambda: PScore(params.model, names, exposures.items))
            if model is None:
                # The judge measures the same preference: it learns it with the same weights.
                trained = train_pscore(
                    exposures, own, objectives, params, run.seed + number,
                    weight_O=finished.weight_O, device=device, advance=advance,
                    found=finished.choose,
                )  # fmt: skip
                model = trained.model
                if finished.weight_O is None:
                    finished.choose(trained.weight_O, trained.tried)
                finished.save(name, model)
            advance(1.0)
            model = model.to(device)
            found = measure_pscore(model, exposures, material.valid_S, params, run.seed)
            save_pscore(model.cpu(), Path(told.path()), name)
            metrics |= _metrics(name, found, exposures.labels.names, objectives)
            facts[name] = _facts(found, len(own.train_S))
    assert finished.weight_O is not None
    if finished.tried:
        facts["candidates_mean_auc"] = finished.tried
    left_out = [name for name in exposures.labels.names if name not in names]
    if left_out:
        run.note(f"too few labels to learn: {', '.join(left_out)}")
    told.write_json(
        {
            "objectives": names,
            "weights": dict(zip(names, np.round(finished.weight_O, 4).tolist(), strict=True)),
            "train_exposures": sum(len(own.train_S) for own in material.cuts.values()),
            "valid_exposures": len(material.valid_S),
            **facts,
        }
    )
    return metrics


def _exposures(inputs: Inputs, params: PScoreConfig) -> Any:
    """Everything the models read, and the ids of the train users."""
    from components.data.contracts import FEEDBACK
    from components.training.onerec.data import read_sequences
    from components.training.onerec.reward.exposures import Exposures

    train, interactions = inputs["train_sequences"], inputs["interactions"]
    keys = train.read_table(["user_id", "item_index", "timestamp_ms"])
    present = set(interactions.schema.names)
    wanted = [n for n in ("user_id", "item_id", "timestamp", *FEEDBACK) if n in present]
    exposures = Exposures.of(
        read_sequences(train.batches()),
        keys,
        interactions.batches(wanted),
        inputs["catalogue"].read_table(["item_id"])["item_id"].to_numpy(),
        inputs["items"].read_table(["item_id", "tags", "author_id", "duration_s"]),
        inputs["users"].read_table(),
        inputs["item_embedding"].load_state_dict()["embedding"],
        params.model,
    )
    return exposures, keys["user_id"].to_numpy()


def _metrics(
    name: str, found: dict[str, Measured], names: tuple[str, ...], objectives: list[int]
) -> dict[str, float]:
    import math

    metrics = {}
    for number in objectives:
        objective = names[number]
        measured = found[objective]
        for kind, value in (
            ("tower_auc", measured.tower_auc.value),
            ("tower_gauc", measured.tower_gauc.value),
            ("p_auc", measured.p_auc.value),
        ):
            if math.isfinite(value):
                metrics[f"{name}_{kind}_{objective}"] = value
    return metrics


def _facts(found: dict[str, Measured], exposures: int) -> dict[str, Any]:
    from dataclasses import asdict

    return {"exposures": exposures, "auc": {name: _finite(asdict(m)) for name, m in found.items()}}


def _finite(value: Any) -> Any:
    """JSON knows no NaN: an AUC without both classes is null."""
    import math

    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return value if not isinstance(value, float) or math.isfinite(value) else None
