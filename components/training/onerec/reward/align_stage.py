"""The `align_recommender` stage: reinforcement learning with a preference model as reward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from components.pipeline.stage import Inputs, Outputs, Run, stage
from components.training.onerec.reward.config import AlignStageConfig
from components.training.onerec.reward.stage import JUDGE, REWARD
from components.training.onerec.threads import torch_threads

if TYPE_CHECKING:
    from components.training.onerec.reward.align import Crew, Parts, Progress

#: Lists and unconstrained samples of a validation user.
WIDTHS, SAMPLES = (8, 32), 32


class AlignRecommenderParams(AlignStageConfig):
    """Reinforcement learning, its validation and the machines it takes."""

    rollout_workers: int = Field(
        1, ge=0, description="Ray actors that generate; 0: everything in one process, without Ray"
    )
    cpus_per_actor: int = Field(
        1,
        ge=1,
        description="CPUs and threads of each actor, and threads of this stage's own process; "
        "others give other last bits",
    )
    gpu: bool = Field(False, description="a GPU for the trainer and for each rollout worker")
    viral_tags: list[str] = Field(
        [],
        max_length=1000,
        description="tags whose items the industrial reward is about, with viral_share below 1",
    )
    valid_users: int = Field(500, ge=1, description="validation users at most (spread evenly)")
    max_ndcg_loss: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of validation NDCG@10 that the chosen weights may lose",
    )

    @model_validator(mode="after")
    def _viral_tags_have_a_share_to_exceed(self) -> Self:
        if self.viral_tags and self.viral_share == 1:
            raise ValueError(
                "viral_tags are given, and viral_share 1 can never be exceeded: set viral_share to "
                "the share of lists that such items may take"
            )
        return self


@stage(
    inputs=(
        "catalogue",
        "items",
        "users",
        "train_sequences",
        "valid_examples",
        "semantic_ids",
        "pretrained_recommender",
        "reward_model",
    ),
    outputs=("recommender", "alignment_curve"),
    params=AlignRecommenderParams,
    gpus=lambda params: 1 + params.rollout_workers if params.gpu else 0,
)
def align_recommender(
    params: AlignRecommenderParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Aligns the recommender with the preference model (ECPO beside supervised fine-tuning)."""
    import shutil

    import pyarrow as pa
    from pyarrow import csv

    from components.training.onerec.reward.figures import alignment_figure

    aligned = outputs["recommender"]
    source = Path(inputs["pretrained_recommender"].path())
    rows: list[dict[str, float]] = []
    metrics: dict[str, float] = {"steps": 0.0, "best_step": 0.0}
    weights: dict[str, Any] = {}
    if inputs["reward_model"].read_json()["objectives"]:
        with torch_threads(params.cpus_per_actor):
            progress, metrics = _align(params, inputs, run)
        rows, weights = progress.curve, progress.best_weights
    else:
        run.note("there is no preference model: the recommender is passed on as it is")
    for file in source.iterdir():
        if file.name != "model.safetensors" or not weights:
            shutil.copyfile(file, aligned.path(file.name))
    if weights:
        aligned.save_state_dict(weights)
    names = sorted({name for row in rows for name in row} - {"step"})
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in names)])
    curve = pa.Table.from_pylist(rows, schema=schema)
    outputs["alignment_curve"].write_table(curve)
    csv.write_csv(curve, outputs["alignment_curve"].path("curve.csv"))
    if rows:
        run.figure("alignment", alignment_figure(rows))
    return metrics


def _align(params: AlignRecommenderParams, inputs: Inputs, run: Run) -> Any:
    """Progress after all steps, and the metrics of the stage."""
    from components.training.onerec.reward import align as method

    world = _World(params, inputs, run.seed)
    if world.unknown_tags:
        run.note(f"no item has these viral_tags: {', '.join(world.unknown_tags)}")
    folder = run.checkpoints.fetch("align")
    progress = method.load_progress(folder)
    before = world.validate(None)
    if progress.trainer is None:
        progress.best_score = before["valid_reward"]
    run.log(before, 0)

    def checkpoint(now: Progress) -> None:
        assert now.trainer is not None
        found = world.validate(now.trainer.weights)
        now.curve[-1].update(found)
        run.log(found, now.step)
        floor = (1 - params.max_ndcg_loss) * before["valid_ndcg_at_10"]
        if found["valid_ndcg_at_10"] >= floor and found["valid_reward"] > now.best_score:
            now.best_score, now.best_step = found["valid_reward"], now.step
            now.best_weights = now.trainer.weights
        run.checkpoints.keep(method.save_progress(now, folder))

    with (
        run.progress(params.steps, "aligning") as bar,
        _crew(params, world.parts(params, run.seed)) as crew,
    ):
        bar.advance(progress.step)
        run.note(crew.get(crew.call(crew.trainer, "fine_tuned_on")))

        def log(metrics: Any, step: int) -> None:
            run.log(dict(metrics), step)
            bar.advance(1)

        method.align(crew, params, progress, log=log, checkpoint=checkpoint)
    after = before
    if progress.best_step:
        after = next(row for row in progress.curve if row["step"] == progress.best_step)
        run.note(f"aligned after {progress.best_step} of {progress.step} steps")
    else:
        run.note(
            "no weights have a higher reward at as good a validation NDCG@10: the recommender "
            "stays as it is"
        )
    names = [name for name in before if name in after]
    return progress, {
        "steps": float(progress.step),
        "best_step": float(progress.best_step),
        **{f"{name}_before": before[name] for name in names},
        **{name: after[name] for name in names},
        "max_staleness": max(row["staleness"] for row in progress.curve),
        "max_gradient_norm": max(row["gradient_norm"] for row in progress.curve),
    }


@contextmanager
def _crew(params: AlignRecommenderParams, parts: Parts) -> Iterator[Crew]:
    from components.training.onerec.reward.align import in_process, on_ray

    with (
        on_ray(
            parts,
            rollout_workers=params.rollout_workers,
            cpus=params.cpus_per_actor,
            gpu=params.gpu,
        )
        if params.rollout_workers
        else nullcontext(in_process(parts))
    ) as crew:
        yield crew


class _World:
    """Artifacts as the alignment needs them."""

    def __init__(self, params: AlignRecommenderParams, inputs: Inputs, seed: int) -> None:
        import numpy as np

        from components.training.onerec.data import read_sequences
        from components.training.onerec.recommender import Recommender, popularity
        from components.training.onerec.reward import features
        from components.training.onerec.reward.pscore import load_pscore
        from components.training.onerec.reward.rewards import flagged_items
        from components.training.onerec.train import TrainingData

        self.seed = seed
        columns = ["item_id", "train_count", "train_positive_count"]
        catalogue = inputs["catalogue"].read_table(columns)
        counts = (catalogue[name].to_numpy() for name in ("train_positive_count", "train_count"))
        popularity_N = popularity(*counts)
        self.recommender = Recommender.load(
            Path(inputs["pretrained_recommender"].path()),
            Path(inputs["semantic_ids"].path()),
            popularity_N,
            "cuda" if params.gpu else "cpu",
        )
        self.data = TrainingData(
            train=read_sequences(inputs["train_sequences"].batches()),
            valid=read_sequences(inputs["valid_examples"].batches()),
            codes_NQ=self.recommender.codes_NQ,
            popularity_N=popularity_N,
            features=self.recommender.features,
        )
        folder = Path(inputs["reward_model"].path())
        self.pscores = {name: load_pscore(folder, name) for name in (REWARD, JUDGE)}
        facts = inputs["reward_model"].read_json()
        buckets = self.pscores[REWARD].size.user_buckets
        users = inputs["users"].read_table()
        train_ids, valid_ids = self.data.train.user_id_U, self.data.valid.user_id_U
        self.user_UF = features.user_features(train_ids, users, buckets)
        self.valid_UF = features.user_features(valid_ids, users, buckets)
        split = (facts["held_out_share"], facts["split_seed"])
        held_U = features.split_users(train_ids, *split)["held_out"]
        self.user_R = np.flatnonzero(~held_U)
        if not len(self.user_R):
            self.user_R = np.arange(len(train_ids))
        # Weights are chosen on users from whom no preference was learned, where there are any.
        chosen = np.flatnonzero(features.split_users(valid_ids, *split)["held_out"])
        if not len(chosen):
            chosen = np.arange(len(valid_ids))
        some = np.linspace(0, len(chosen) - 1, min(len(chosen), params.valid_users)).astype(int)
        self.valid_U = self.data.valid.example_targets()[chosen[np.unique(some)]]
        self.flagged_N, self.unknown_tags = flagged_items(
            catalogue["item_id"].to_numpy(),
            inputs["items"].read_table(["item_id", "tags"]),
            params.viral_tags,
        )

    def parts(self, params: AlignRecommenderParams, seed: int) -> Parts:
        from components.training.onerec.reward.align import Parts
        from components.training.onerec.reward.config import AlignConfig
        from components.training.onerec.reward.features import requests_after

        requests = requests_after(self.data.train)
        config = AlignConfig(**params.model_dump(include=set(AlignConfig.model_fields)))
        common = {"requests": requests, "config": config}
        return Parts(
            rollout={
                **common, "recommender": self.recommender, "user_R": self.user_R, "seed": seed
            },
            reward={
                **common,
                "pscore": self.pscores[REWARD],
                "user_UF": self.user_UF,
                "codes_NQ": self.data.codes_NQ,
                "flagged_N": self.flagged_N,
            },
            trainer={
                **common, "recommender": self.recommender, "data": self.data, "seed": seed
            },
        )  # fmt: skip

    def validate(self, weights: dict[str, Any] | None) -> dict[str, float]:
        """Validation figures of some weights; None: those of the recommender itself."""
        from components.training.onerec.reward.evaluation import offer
        from components.training.onerec.reward.workers import with_weights

        recommender = self.recommender
        if weights is not None:
            recommender = with_weights(recommender, weights)
        found = offer(
            recommender,
            self.pscores,
            self.data.valid,
            self.valid_U,
            self.valid_UF,
            widths=WIDTHS,
            samples=SAMPLES,
            seed=self.seed,
        )
        return {
            "valid_reward": float(found.mean[REWARD, WIDTHS[0]].mean()),
            "valid_judge": float(found.mean[JUDGE, WIDTHS[0]].mean()),
            "valid_ndcg_at_10": float(found.ndcg_U.mean()),
            "valid_legality": float(found.legality_U.mean()),
            "valid_distinct_items": float(found.distinct),
        }
