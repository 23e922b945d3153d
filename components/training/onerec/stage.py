"""The `train_recommender` stage: the encoder-decoder over semantic ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from components.pipeline.stage import Inputs, Outputs, Run, stage
from components.training.onerec.config import (
    LifelongConfig,
    OneRecConfig,
    OneRecSize,
    TrainConfig,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from components.pipeline.artifacts import Input
    from components.pipeline.cluster import WorkerContext
    from components.training.onerec.data import Sequences
    from components.training.onerec.train import TrainingData


class TrainRecommenderParams(TrainConfig):
    """The model, its training and the machines it takes."""

    model: OneRecSize = Field(default_factory=OneRecSize, description="architecture")
    workers: int = Field(2, ge=1, description="data-parallel workers")
    gpu: bool = Field(False, description="one GPU a worker (NCCL); otherwise CPUs (gloo)")

    @model_validator(mode="after")
    def _workers_share_a_batch_evenly(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of workers {self.workers}"
            )
        return self


@stage(
    inputs=(
        "catalogue",
        "items",
        "users",
        "aligned_embedding",
        "train_sequences",
        "valid_examples",
        "semantic_ids",
    ),
    outputs=("pretrained_recommender", "training_curve"),
    params=TrainRecommenderParams,
    gpus=lambda params: params.workers if params.gpu else 0,
)
def train_recommender(
    params: TrainRecommenderParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Trains the encoder-decoder to write the semantic id of the next item (Ray Train, DDP)."""
    import pyarrow as pa
    from pyarrow import csv

    from components.pipeline.cluster import train_on_ray
    from components.pipeline.errors import DataContractError
    from components.training.onerec.figures import training_figure
    from components.training.onerec.recommender import trained_on
    from components.training.onerec.train import successors_of, training_targets
    from components.training.onerec.train_state import load_state

    ids = inputs["semantic_ids"].read_json()
    given = {name: ids[name] for name in ("num_levels", "codebook_size", "num_items")}
    model = OneRecConfig(**params.model.model_dump(), **given)
    if _all_positive(inputs["catalogue"]):
        # Nothing tells a liked event from another: the pathway would repeat the newest events.
        model = model.model_copy(update={"positive_feedback": 0})
        run.note("every event is positive: the encoder has no positive-feedback pathway")
    chosen = params.model_dump(include=set(TrainConfig.model_fields))
    training = TrainConfig(**{**chosen, "seed": run.seed})
    files = {
        "train": inputs["train_sequences"].path("table.parquet"),
        "valid": inputs["valid_examples"].path("table.parquet"),
        "semantic_ids": inputs["semantic_ids"].path("model.safetensors"),
        "aligned_embedding": inputs["aligned_embedding"].path("model.safetensors"),
        **{n: inputs[n].path("table.parquet") for n in ("catalogue", "items", "users")},
    }
    data = read_training_data({name: Path(path) for name, path in files.items()}, model)
    assert data.features is not None
    model = model.model_copy(update=data.features.sizes(model.features))
    if model.features.static and not model.static_rows:
        run.note("nothing is known of users but their events: the encoder has no static pathway")
    if model.lifelong.entries and not _has_long_histories(data.train, model):
        model = model.model_copy(update={"lifelong": LifelongConfig(entries=0)})
        run.note(
            "hardly a user has more events than the short-term pathway reads: the encoder has no "
            "lifelong pathway"
        )
    if shown := shorter_histories(data.train, data.valid, model.lifelong.entries):
        run.note(
            f"examples have {shown} events of history at most, the lifelong pathway reads "
            f"{model.lifelong.entries} in training: raise split.max_history"
        )
    targets = training_targets(data, training.targets)
    if not len(targets):
        raise DataContractError(
            "there is nothing to learn: no user has two events before the validation period",
            where="artifact 'train_sequences'",
            remedy="bring a longer log, or let validation begin later: split.valid_from",
        )
    data.features.save(Path(outputs["pretrained_recommender"].path()))
    config = {
        "model": model.model_dump(mode="json"),
        "training": training.model_dump(mode="json"),
        "files": files,
    }
    with run.progress(1.0, "training") as bar:
        done = 0.0

        def log(metrics: Mapping[str, float], step: int | None) -> None:
            nonlocal done
            run.log({k: v for k, v in metrics.items() if k != "progress"}, step)
            bar.advance(max(0.0, metrics.get("progress", 0.0) - done))
            done = max(done, metrics.get("progress", 0.0))

        last = train_on_ray(
            training_loop,
            config,
            num_workers=params.workers,
            use_gpu=params.gpu,
            storage=run.checkpoints,
            name="onerec",
            log=log,
        )
    state = load_state(last)
    outputs["pretrained_recommender"].save_state_dict(state.best_weights)
    if model.memory.successors:
        counted = successors_of(data, targets, model)
        outputs["pretrained_recommender"].save_state_dict(vars(counted), name="memory.safetensors")
    outputs["pretrained_recommender"].write_json(
        {
            "model": model.model_dump(mode="json"),
            **trained_on(ids, data.codes_NQ),
            "targets": training.targets,
        },
        "config.json",
    )
    names = sorted({name for row in state.curve for name in row} - {"step"})
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in names)])
    curve = pa.Table.from_pylist(state.curve, schema=schema)
    outputs["training_curve"].write_table(curve)
    csv.write_csv(curve, outputs["training_curve"].path("curve.csv"))
    run.figure("training curve", training_figure(state.curve))
    run.note(f"stopped by {state.stopped} after {state.step} steps, best at {state.best_step}")
    return {
        "valid_ndcg_at_10": state.best_score,
        "best_step": float(state.best_step),
        "steps": float(state.step),
        "training_seconds": state.seconds,
        "parameters": float(sum(w.numel() for w in state.best_weights.values())),
    }


def _all_positive(catalogue: Input) -> bool:
    counts = catalogue.read_table(["train_count", "train_positive_count"])
    return bool(counts["train_count"].equals(counts["train_positive_count"]))


def _has_long_histories(train: Sequences, model: OneRecConfig) -> bool:
    """Whether one event in twenty, at least, comes after more than the short-term window."""
    import numpy as np

    length_U = np.diff(train.start_U1)
    return bool(20 * np.maximum(length_U - model.short_term, 0).sum() >= length_U.sum())


def shorter_histories(train: Sequences, examples: Sequences, entries: int) -> int:
    """Longest history of the examples where training reads longer ones, or else 0."""
    import numpy as np

    longest_train = int(np.diff(train.start_U1).max(initial=0))
    longest = int(np.diff(examples.start_U1).max(initial=0)) - 1
    return longest if 0 <= longest < min(entries, longest_train) else 0


def training_loop(config: dict[str, Any], worker: WorkerContext) -> None:
    """What every Ray worker runs."""
    from components.training.onerec.train import train
    from components.training.onerec.train_state import load_state

    model = OneRecConfig(**config["model"])
    train(
        model,
        read_training_data({k: Path(v) for k, v in config["files"].items()}, model),
        TrainConfig(**config["training"]),
        rank=worker.rank,
        world_size=worker.world_size,
        device=worker.device,
        # The memory's counts are buffers, alike on every worker from the start.
        wrap=lambda model: worker.prepare(model, broadcast_buffers=False),
        log=worker.log,
        checkpoint=worker.checkpoint,
        restore=load_state(worker.restored) if worker.restored else None,
    )


def read_training_data(files: dict[str, Path], size: OneRecSize) -> TrainingData:
    """Training data from the files of the artifacts that ``train_recommender`` reads."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    from components.training.onerec.data import read_sequences
    from components.training.onerec.features import Features
    from components.training.onerec.recommender import popularity
    from components.training.onerec.train import TrainingData

    columns = ["item_id", "train_positive_count", "train_count"]
    catalogue = pq.read_table(files["catalogue"], columns=columns)
    counts = (catalogue[name].to_numpy() for name in ("train_positive_count", "train_count"))
    train = read_sequences(pq.ParquetFile(files["train"]).iter_batches())
    # Items that only interactions name have no row here: take() by null gives them nulls.
    items = pq.read_table(files["items"], columns=["item_id", "author_id", "tags"])
    row = pc.index_in(catalogue["item_id"], items["item_id"].combine_chunks()).combine_chunks()
    reads_content = size.features.content or size.lifelong.entries
    content_ND = load_file(files["aligned_embedding"])["embedding"] if reads_content else None
    return TrainingData(
        train=train,
        valid=read_sequences(pq.ParquetFile(files["valid"]).iter_batches()),
        codes_NQ=load_file(files["semantic_ids"])["codes"],
        popularity_N=popularity(*counts),
        features=Features.fit(
            items.take(row),
            pq.read_table(files["users"]),
            pa.array(train.user_id_U),
            size.features,
            content_ND,
        ),
    )
