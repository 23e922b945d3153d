"""The `align_recommender` stage: reinforcement learning with a preference model as reward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from components.pipeline.cpu_threads import cpu_threads
from components.pipeline.stage import Inputs, Outputs, Run, stage
from components.training.onerec.reward.config import AlignStageConfig
from components.training.onerec.reward.stage import JUDGE, REWARD

if TYPE_CHECKING:
    import pyarrow as pa

    from components.pipeline.artifacts import Output
    from components.training.onerec.reward.align import Crew, Parts, Progress
    from components.training.onerec.reward.evaluation import Offered

#: Beams and unconstrained samples of a validation user.
BEAMS, SAMPLES = 32, 32
#: What is said of users: P-Scores of their lists by both models, ranking, legality by itself.
FIGURES = ("reward", "judge", "ndcg_at_10", "legality", "distinct_items")
#: Per-user figures before and after, of the users that chose no aligned weights.
REPORTED_USERS = "reported_users.safetensors"


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
    valid_users: int = Field(
        500,
        ge=1,
        description="validation users at most that choose the weights, and as many others that "
        "figures are reported of",
    )
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

    import torch
    from pyarrow import csv

    aligned = outputs["recommender"]
    source = Path(inputs["pretrained_recommender"].path())
    rows: list[dict[str, float]] = []
    metrics: dict[str, float] = {"steps": 0.0, "best_step": 0.0}
    weights: dict[str, torch.Tensor] = {}
    told = outputs["alignment_curve"]
    if inputs["reward_model"].read_json()["objectives"]:
        with cpu_threads(params.cpus_per_actor):
            rows, weights, metrics = _align(params, inputs, told, run)
    else:
        run.note("there is no preference model: the recommender is passed on as it is")
        told.write_json({"best_step": 0, "steps": 0})
    for file in source.iterdir():
        if file.name != "model.safetensors" or not weights:
            shutil.copyfile(file, aligned.path(file.name))
    if weights:
        aligned.save_state_dict(weights)
    curve = _table(rows)
    told.write_table(curve)
    csv.write_csv(curve, told.path("curve.csv"))
    return metrics


def _align(
    params: AlignRecommenderParams, inputs: Inputs, told: Output, run: Run
) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, float]]:
    """Rows of the curve, the weights that are kept (empty: none), and the metrics of the stage."""
    from components.training.onerec.reward import align as method
    from components.training.onerec.reward import choice
    from components.training.onerec.reward.figures import alignment_figure

    world = _World(params, inputs, run.seed)
    if world.unknown_tags:
        run.note(f"no item has these viral_tags: {', '.join(world.unknown_tags)}")
    folder = run.checkpoints.fetch("align")
    progress = method.load_progress(folder)
    before = world.offered(None, world.choose_U)
    run.log(_figures("choice", before), 0)
    if not progress.curve:
        progress.curve.append({"step": 0, **_figures("choice", before)})

    def checkpoint(now: Progress) -> None:
        assert now.trainer is not None
        offered = world.offered(now.trainer.weights, world.choose_U)
        found = _figures("choice", offered)
        now.curve[-1].update(found)
        run.log(found, now.step)
        choice.keep_if_better(now, offered, before, params.max_ndcg_loss)
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
    kept, floor = progress.best_weights, choice.ndcg_floor(before, params.max_ndcg_loss)
    run.figure("alignment", alignment_figure(progress.curve, progress.best_step, floor))
    reported = world.offered(None, world.report_U)
    after = world.offered(kept, world.report_U) if kept else reported
    if kept:
        run.note(f"the weights after {progress.best_step} of {progress.step} steps are kept")
    else:
        run.note(
            "no weights have a higher reward at as good a validation NDCG@10: the recommender "
            "stays as it is"
        )
    told.write_json(
        {
            "best_step": progress.best_step,
            "steps": progress.step,
            "ndcg_floor": floor,
            "choosing_users": len(world.choose_U),
        }
    )
    told.save_state_dict(
        {
            f"{name}{when}": values_U
            for when, offered in (("_before", reported), ("", after))
            for name, values_U in _per_user(offered).items()
        },
        name=REPORTED_USERS,
    )
    steps = [row for row in progress.curve if row["step"]]
    return (
        progress.curve,
        kept,
        {
            "steps": float(progress.step),
            "best_step": float(progress.best_step),
            "choosing_users": float(len(world.choose_U)),
            "valid_users": float(len(world.report_U)),
            **{f"{name}_before": value for name, value in _figures("valid", reported).items()},
            **_figures("valid", after),
            "max_staleness": max(row["staleness"] for row in steps),
            "max_gradient_norm": max(row["gradient_norm"] for row in steps),
        },
    )


def _per_user(offered: Offered) -> dict[str, Any]:
    """float64 [U] each: what the report compares user by user."""
    from components.training.onerec.reward.choice import CHOSEN_BY

    width = CHOSEN_BY[1]
    return {
        "reward": offered.mean[REWARD, width],
        "judge": offered.mean[JUDGE, width],
        "ndcg_at_10": offered.ndcg_U,
        "legality": offered.legality_U,
    }


def _figures(whose: str, offered: Offered) -> dict[str, float]:
    """Means over some users: ``choice`` of those that choose, ``valid`` of those reported of."""
    values = {name: float(values_U.mean()) for name, values_U in _per_user(offered).items()}
    values["distinct_items"] = float(offered.distinct)
    return {f"{whose}_{name}": values[name] for name in FIGURES}


def _table(rows: list[dict[str, float]]) -> pa.Table:
    """The curve; its figures of choosing users are columns whether or not there are rows."""
    import pyarrow as pa

    given = {name for row in rows for name in row} - {"step"}
    names = sorted(given | {f"choice_{name}" for name in FIGURES})
    schema = pa.schema([("step", pa.int64()), *((name, pa.float64()) for name in names)])
    return pa.Table.from_pylist(rows, schema=schema)


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
        from components.training.onerec.reward.choice import part_users
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
        held_out_U = features.split_users(valid_ids, *split)["held_out"]
        event_U = self.data.valid.example_targets()
        self.choose_U, self.report_U = (
            event_U[users] for users in part_users(held_out_U, params.valid_users)
        )
        self.flagged_N, self.unknown_tags = flagged_items(
            catalogue["item_id"].to_numpy(),
            inputs["items"].read_table(["item_id", "tags"]),
            params.viral_tags,
        )

    def parts(self, params: AlignRecommenderParams, seed: int) -> Parts:
        from components.training.onerec.reward.align import Parts
        from components.training.onerec.reward.config import AlignConfig

        config = AlignConfig(**params.model_dump(include=set(AlignConfig.model_fields)))
        return Parts.of(
            self.recommender,
            self.data,
            self.pscores[REWARD],
            config,
            seed,
            user_UF=self.user_UF,
            user_R=self.user_R,
            flagged_N=self.flagged_N,
        )

    def offered(self, weights: dict[str, Any] | None, event_U: Any) -> Offered:
        """What some weights offer validation users; None: those of the recommender itself."""
        from components.training.onerec.reward.choice import CHOSEN_BY
        from components.training.onerec.reward.evaluation import offer
        from components.training.onerec.reward.workers import with_weights

        recommender = self.recommender
        if weights is not None:
            recommender = with_weights(recommender, weights)
        return offer(
            recommender,
            self.pscores,
            self.data.valid,
            event_U,
            self.valid_UF,
            width=BEAMS,
            samples=SAMPLES,
            seed=self.seed,
        ).offered((CHOSEN_BY[1],))
