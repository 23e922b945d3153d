"""Claims about the alignment stage: who chooses weights, who is reported of, what a kill costs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from onerec_world import GROUPS
from ray.cluster_utils import Cluster
from reward_world import ALIGN_STAGE, REWARD_STAGE, RewardWorld, give_all
from stage_harness import Bench

from components.pipeline.artifacts import Inputs
from components.pipeline.errors import StageError
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward import choice
from components.training.onerec.reward.align import Progress, in_process, on_ray
from components.training.onerec.reward.align_stage import (
    REPORTED_USERS,
    AlignRecommenderParams,
    _figures,
    _per_user,
    _World,
    align_recommender,
)
from components.training.onerec.reward.evaluation import Offered
from components.training.onerec.reward.features import (
    requests_after,
    requests_at,
    split_users,
    user_features,
)
from components.training.onerec.reward.rewards import preference_reward
from components.training.onerec.reward.stage import TrainRewardModelParams, train_reward_model
from components.training.onerec.reward.workers import TrainerState

SHARE = 0.3
REWARD_MODEL = TrainRewardModelParams(**{**REWARD_STAGE.model_dump(), "held_out_share": SHARE})
#: Steps that move the lists at once.
ALIGN = AlignRecommenderParams(
    **{**ALIGN_STAGE.model_dump(), "learning_rate": 1e-2, "preference_weight": 30.0}
)
WRITTEN = ("recommender", "alignment_curve")


@pytest.fixture(scope="module")
def artifacts(
    world: RewardWorld, recommender: Recommender, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    """All that the stage reads."""
    bench = Bench(tmp_path_factory.mktemp("given"))
    give_all(bench, world, recommender, signals=True)
    bench.run(train_reward_model, REWARD_MODEL)
    return bench


def beside(artifacts: Bench, folder: Path, valid: pa.Table | None = None) -> Bench:
    """A bench of its own with the same artifacts, with other validation examples if given."""
    bench = Bench(folder)
    bench.artifacts = dict(artifacts.artifacts)
    if valid is not None:
        bench.give("valid_examples", lambda out: out.write_table(valid))
    return bench


def curve_of(bench: Bench) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = bench.artifacts["alignment_curve"].read_table().to_pylist()
    return [row for row in rows if row["choice_reward"] is not None]


def with_targets(valid: pa.Table, target_U: np.ndarray) -> pa.Table:
    place = valid.schema.get_field_index("target")
    field = valid.schema.field("target")
    return valid.set_column(place, field, pa.array(target_U).cast(field.type))


def held_out(valid: pa.Table) -> np.ndarray:
    return split_users(valid["user_id"].to_numpy(), SHARE, 0)["held_out"]


@pytest.mark.parametrize(
    ("held_out", "most", "choose", "report"),
    [
        ([0, 1, 0, 0, 1, 0], 9, [0, 2, 3, 5], [1, 4]),
        ([0, 1, 0, 0, 1, 0], 2, [0, 5], [1, 4]),
        # Nobody, or everybody, without a preference model: every other user.
        ([0, 0, 0, 0, 0], 9, [0, 2, 4], [1, 3]),
        ([1, 1, 1, 1], 1, [0], [1]),
        ([0], 9, [0], [0]),
    ],
)
def test_who_chooses_is_not_reported_of(
    held_out: list[int], most: int, choose: list[int], report: list[int]
) -> None:
    found = choice.part_users(np.array(held_out, bool), most)
    assert [users.tolist() for users in found] == [choose, report]


def offered(reward: float, ndcg: float) -> Offered:
    mean = {("reward", 8): np.array([reward - 0.1, reward + 0.1]), ("judge", 8): np.ones(2)}
    return Offered({}, mean, np.array([0.0, 2 * ndcg]), np.zeros(2), 1)


def test_the_highest_reward_at_no_lower_ndcg_is_kept() -> None:
    before = offered(0.5, 0.10)
    checkpoints = {
        10: (0.49, 0.20),  # a lower reward than before
        20: (0.55, 0.09),  # a lower NDCG
        30: (0.52, 0.10),
        40: (0.54, 0.11),
        50: (0.53, 0.30),  # a lower reward than step 40
        60: (0.60, 0.0999),
    }

    def kept(loss: float) -> tuple[list[int], Progress]:
        progress, taken = Progress(), []
        for step, found in checkpoints.items():
            progress.trainer = TrainerState(step, {"w": step}, {})  # type: ignore[dict-item]
            if choice.keep_if_better(progress, offered(*found), before, loss):
                taken.append(step)
        return taken, progress

    taken, progress = kept(0.0)
    assert taken == [30, 40]
    assert (progress.best_step, progress.best_weights) == (40, {"w": 40})
    assert progress.best_score == pytest.approx(0.54)
    assert kept(0.05)[0] == [30, 40, 60]
    assert kept(0.2)[0] == [20, 60]


def test_weights_that_lose_ndcg_are_not_kept_whatever_their_reward(
    artifacts: Bench, world: RewardWorld, data: Any, recommender: Recommender, tmp_path: Path
) -> None:
    # Whatever the alignment changes is for the worse: the targets are what is ranked first now.
    event_U = data.valid.example_targets()
    ((first, _),) = recommender.rank(data.valid, event_U, beams=32, top_n=1, batch_size=64)
    bench = beside(artifacts, tmp_path, with_targets(world.valid, first[:, 0]))

    def run(loss: float) -> dict[str, float]:
        bench.run(align_recommender, ALIGN.model_copy(update={"max_ndcg_loss": loss}))
        assert bench.last_run is not None
        bench.last_run.checkpoints.clear()
        return bench.artifacts["alignment_curve"].read_json()

    assert run(0.99)["best_step"] > 0
    before, *after = curve_of(bench)
    assert before["step"] == 0
    assert before["choice_ndcg_at_10"] == 1
    best = max(after, key=lambda row: row["choice_reward"])
    better = [row for row in after if row["choice_reward"] > before["choice_reward"]]
    assert best["choice_ndcg_at_10"] < 1
    # A floor that the best does not reach and another one does.
    others = [row for row in better if row["choice_ndcg_at_10"] > best["choice_ndcg_at_10"]]
    second = max(others, key=lambda row: row["choice_ndcg_at_10"])
    assert run(1 - second["choice_ndcg_at_10"] + 1e-9)["best_step"] == second["step"]
    told = run(0.0)
    assert told["best_step"] == 0
    assert told["ndcg_floor"] == 1
    assert bench.last_run is not None
    assert "stays as it is" in bench.last_run.notes[-1]
    given, passed = (
        Path(bench.artifacts[n].path()) for n in ("pretrained_recommender", "recommender")
    )
    assert (given / "model.safetensors").read_bytes() == (passed / "model.safetensors").read_bytes()


def test_figures_are_of_users_who_neither_taught_a_preference_nor_chose(
    artifacts: Bench, world: RewardWorld, tmp_path: Path
) -> None:
    held_out_U = held_out(world.valid)
    few = ALIGN.model_copy(update={"steps": 1})
    target_U = world.valid["target"].to_numpy()
    found = {}
    for name, changed_U in {
        "same": np.zeros(len(target_U), bool),
        "those reported of": held_out_U,
        "those who choose": ~held_out_U,
    }.items():
        valid = with_targets(world.valid, np.where(changed_U, (target_U + 30) % 60, target_U))
        bench = beside(artifacts, tmp_path / name, valid)
        metrics = bench.run(align_recommender, few)
        found[name] = (
            [row["choice_ndcg_at_10"] for row in curve_of(bench)],
            metrics["valid_ndcg_at_10_before"],
        )
    curve, figure = found["same"]
    assert found["those reported of"][0] == curve
    assert found["those reported of"][1] != figure
    assert found["those who choose"][0] != curve
    assert found["those who choose"][1] == figure
    assert metrics["valid_users"] == held_out_U.sum() > 0
    assert metrics["choosing_users"] == (~held_out_U).sum() > 0
    # The same figures user by user, for whoever compares them.
    users = bench.artifacts["alignment_curve"].load_arrays(REPORTED_USERS)
    assert {len(values_U) for values_U in users.values()} == {held_out_U.sum()}
    for name in ("reward", "judge", "ndcg_at_10", "legality"):
        for when in ("", "_before"):
            mean = users[f"{name}{when}"].mean()
            assert metrics[f"valid_{name}{when}"] == pytest.approx(float(mean))


def test_nothing_is_generated_for_users_held_out(artifacts: Bench, world: RewardWorld) -> None:
    inputs = Inputs(artifacts.artifacts, [])
    everybody = ALIGN.model_copy(update={"users": 10_000})
    stage_world = _World(everybody, inputs, 0)
    crew = in_process(stage_world.parts(everybody, 0))
    event_B = crew.rollout[0].rollout(0).event_B
    requests = crew.rollout[0]._requests
    users = requests.user_id_U[np.searchsorted(requests.start_U1, event_B, side="right") - 1]
    expected = world.train["user_id"].to_numpy()[~held_out(world.train)]
    assert sorted(users.tolist()) == expected.tolist()
    assert 0 < len(expected) < len(world.train)


def test_rollouts_are_scored_by_the_reward_for_the_user_who_asked(
    artifacts: Bench, world: RewardWorld
) -> None:
    stage_world = _World(ALIGN, Inputs(artifacts.artifacts, []), 0)
    crew = in_process(stage_world.parts(ALIGN, 0))
    reward, judge = (stage_world.pscores[name] for name in ("reward", "judge"))
    assert crew.reward._pscore is reward
    rollouts = crew.rollout[0].rollout(0)
    train = stage_world.data.train
    requests = requests_after(train)
    user_B = np.searchsorted(requests.start_U1, rollouts.event_B, side="right") - 1
    assert len(set(user_B % GROUPS)) > 1
    known = user_features(train.user_id_U[user_B], world.users, reward.size.user_buckets)
    plain = requests_at(
        requests, rollouts.event_B, stage_world.user_UF, world.codes_NQ, reward.size.history
    )
    by_hand = replace(plain, user_BF=torch.from_numpy(known))
    item_BG = rollouts.preferred.item_BG
    expected_BG = preference_reward(reward, by_hand, item_BG)
    flagged_BG = stage_world.flagged_N[item_BG]
    assert 0 < flagged_BG.float().mean() < 1
    factor_BG = torch.where(flagged_BG, ALIGN.viral_alpha, 1.0)
    scores_BG = crew.reward.score(rollouts)
    torch.testing.assert_close(scores_BG, factor_BG * expected_BG)
    assert not torch.allclose(scores_BG, factor_BG * preference_reward(judge, by_hand, item_BG))


def test_figures_of_the_reward_the_judge_and_the_lists_are_each_their_own() -> None:
    users = np.zeros(3)
    scores = {("reward", 8): users + 1, ("judge", 8): users + 2}
    others = {("reward", 32): users + 8, ("judge", 32): users + 9}
    best = dict.fromkeys(scores, users + 7)
    found = Offered(best, scores | others, users + 3, users + 4, 5)
    expected = {"reward": 1, "judge": 2, "ndcg_at_10": 3, "legality": 4}
    assert {n: float(x_U[0]) for n, x_U in _per_user(found).items()} == expected
    of_lists = {"distinct_items": 5.0}
    assert _figures("choice", found) == {
        f"choice_{name}": float(value) for name, value in (expected | of_lists).items()
    }


@pytest.fixture(scope="module")
def one_process(artifacts: Bench, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the stage writes without Ray."""
    bench = beside(artifacts, tmp_path_factory.mktemp("one_process"))
    bench.run(align_recommender, ALIGN)
    return bench.digests(*WRITTEN)


@pytest.fixture(scope="module")
def two_machines() -> Iterator[None]:
    """A Ray cluster of two nodes, of which this machine plays both."""
    node = {"num_cpus": 8, "object_store_memory": 80 * 1024**2}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", cluster.address)
            yield
    finally:
        cluster.shutdown()


def actors() -> dict[psutil.Process, str]:
    """Processes of the alignment and what each of them is."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            title = "".join(child.cmdline()[:1])
            if title.startswith(("ray::RolloutWorker", "ray::RewardWorker", "ray::Trainer")):
                found[child] = title.removeprefix("ray::").partition(".")[0]
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
def test_actors_on_two_machines_write_the_bytes_of_one_process(
    artifacts: Bench, one_process: list[str], tmp_path: Path
) -> None:
    bench = beside(artifacts, tmp_path)
    raylet: dict[str, int] = {}

    def look(metrics: dict[str, float], step: int | None) -> None:
        if step == 1:
            raylet.update((name, process.ppid()) for process, name in actors().items())

    by_ray = ALIGN.model_copy(update={"rollout_workers": 1})
    bench.run(align_recommender, by_ray, log=look)
    assert bench.digests(*WRITTEN) == one_process
    assert set(raylet) == {"RolloutWorker", "RewardWorker", "Trainer"}
    assert len(set(raylet.values())) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
def test_after_an_actor_was_killed_the_same_call_resumes_to_the_same_bytes(
    artifacts: Bench, one_process: list[str], tmp_path: Path
) -> None:
    bench = beside(artifacts, tmp_path)
    by_ray = ALIGN.model_copy(update={"rollout_workers": 2})

    def kill(metrics: dict[str, float], step: int | None) -> None:
        # Beyond the checkpoint of step 4, and others still have to be generated.
        if step == 5:
            process = next(p for p, name in actors().items() if name == "RolloutWorker")
            process.send_signal(signal.SIGKILL)

    # Told by the trainer, which waits for it.
    lost = "RolloutWorker of the alignment died: The actor died"
    with pytest.raises(StageError, match=lost) as died:
        bench.run(align_recommender, by_ray, log=kill)
    assert died.value.remedy is not None
    assert "the same command resumes" in died.value.remedy
    bench.run(align_recommender, by_ray)
    assert bench.last_run is not None
    assert min(step for _, step in bench.last_run.logged if step) == 5
    assert bench.digests(*WRITTEN) == one_process


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
def test_an_error_of_an_actor_arrives_as_what_it_is(artifacts: Bench) -> None:
    world = _World(ALIGN, Inputs(artifacts.artifacts, []), 0)
    with on_ray(world.parts(ALIGN, 0), rollout_workers=1) as crew:
        rollouts = crew.call(crew.rollout[0], "rollout", -1)
        scored = crew.call(crew.reward, "score", rollouts)
        # Two actors on: it could not be computed for what it was given.
        with pytest.raises(StageError, match="the alignment failed: ValueError: "):
            crew.get(crew.call(crew.trainer, "step", rollouts, scored))


@pytest.mark.slow
@pytest.mark.usefixtures("two_machines")
def test_an_actor_that_cannot_begin_says_why(artifacts: Bench) -> None:
    parts = _World(ALIGN, Inputs(artifacts.artifacts, []), 0).parts(ALIGN, 0)
    broken = replace(parts, reward={**parts.reward, "pscore": None})
    with on_ray(broken, rollout_workers=1) as crew:
        rollouts = crew.call(crew.rollout[0], "rollout", 0)
        with pytest.raises(StageError) as caught:
            crew.get(crew.call(crew.reward, "score", rollouts))
    said = str(caught.value)
    assert "the alignment cannot begin: AttributeError: 'NoneType' object has no attribute" in said
    assert "\x1b" not in said
    assert caught.value.remedy is None
