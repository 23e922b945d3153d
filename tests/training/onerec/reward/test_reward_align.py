"""Claims about rollouts and the alignment: what is made, by whom, how old, and what resumes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onerec_world import GROUPS
from pydantic import ValidationError
from reward_world import (
    ALIGN,
    ALIGN_STAGE,
    MODEL,
    REWARD_STAGE,
    RewardWorld,
    give_all,
)
from stage_harness import Bench

from benchmarks.reward_world import shuffled
from components.training.onerec.data import assemble
from components.training.onerec.decode import score_catalogue
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward.align import (
    Crew,
    Parts,
    Progress,
    align,
    in_process,
    load_progress,
    save_progress,
)
from components.training.onerec.reward.align_stage import align_recommender
from components.training.onerec.reward.config import AlignConfig
from components.training.onerec.reward.evaluation import offer
from components.training.onerec.reward.rollout import generate, item_log_probs
from components.training.onerec.reward.stage import train_reward_model
from components.training.onerec.train import TrainingData
from components.training.onerec.trie import Trie


def batch_of(data: TrainingData, users: int) -> Any:
    return assemble(data.valid, data.valid.example_targets()[:users], data.codes_NQ, MODEL)


@pytest.mark.parametrize("sampler", ["beam", "constrained", "sample"])
def test_rollouts_bear_the_log_probability_of_their_policy(
    data: TrainingData, trie: Trie, recommender: Recommender, sampler: Any
) -> None:
    leaf_codes = torch.from_numpy(trie.leaf_codes().astype(np.int64))
    batch, lot = batch_of(data, 5), torch.Generator().manual_seed(0)
    model = recommender.model
    made = generate(model, recommender.trie, leaf_codes, batch, 9, sampler, lot)
    assert made.sid_BGQ.shape == (5, 9, 3)
    # Teacher-forced one item at a time, with the encoder run again for each.
    with torch.inference_mode():
        alone = torch.stack(
            [model.sid_log_probs(batch, made.sid_BGQ[:, g]).sum(1) for g in range(9)], 1
        )
    torch.testing.assert_close(made.log_old_BG, alone, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        together = item_log_probs(model, batch, made.sid_BGQ)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    # An item of an id has that id; an illegal id is nobody's.
    ids = {tuple(code): item for item, code in enumerate(data.codes_NQ.tolist())}
    for sid, item in zip(made.sid_BGQ.flatten(0, 1).tolist(), made.item_BG.flatten().tolist()):
        assert (item >= 0) == (tuple(sid) in ids)
        assert item < 0 or data.codes_NQ[item].tolist() == sid
    if sampler != "sample":
        assert made.legal_BG.all()


def test_samples_follow_the_policy(
    data: TrainingData, trie: Trie, recommender: Recommender
) -> None:
    leaf_codes = torch.from_numpy(trie.leaf_codes().astype(np.int64))
    batch, lot = batch_of(data, 1), torch.Generator().manual_seed(0)
    model, size = recommender.model, 20_000
    chance_V = score_catalogue(model, recommender.trie, batch)[0].exp().double()
    drawn = generate(model, recommender.trie, leaf_codes, batch, size, "sample", lot)
    # Legal mass, and each legal id: five standard deviations.
    legal = float(drawn.legal_BG.double().mean())
    mass = float(chance_V.sum())
    assert abs(legal - mass) < 5 * (mass * (1 - mass) / size) ** 0.5
    key = (leaf_codes * torch.tensor([256, 16, 1])).sum(1)
    found = (drawn.sid_BGQ[0] * torch.tensor([256, 16, 1])).sum(1)
    share_V = (found[None] == key[:, None]).double().mean(1)
    error_V = (chance_V * (1 - chance_V) / size).sqrt()
    assert ((share_V - chance_V).abs() < 5 * error_V + 1e-9).all()


def test_more_beams_than_ids_leave_illegal_places(
    data: TrainingData, trie: Trie, recommender: Recommender
) -> None:
    leaf_codes = torch.from_numpy(trie.leaf_codes().astype(np.int64))
    lot = torch.Generator()
    size = trie.num_leaves + 3
    made = generate(
        recommender.model, recommender.trie, leaf_codes, batch_of(data, 2), size, "beam", lot
    )
    assert made.legal_BG.sum(1).tolist() == [trie.num_leaves] * 2
    assert made.log_old_BG[:, -3:].eq(-torch.inf).all()


def recorded(crew: Crew, calls: list[tuple[Any, ...]]) -> Crew:
    def call(worker: Any, method: str, *args: Any) -> Any:
        calls.append((method, args[0] if method == "rollout" else None))
        return crew.call(worker, method, *args)

    return Crew(crew.rollout, crew.reward, crew.trainer, call, crew.get)


@pytest.mark.parametrize(("bound", "ahead"), [(0, 0), (1, 1), (3, 1), (3, 3)])
def test_staleness_never_exceeds_its_bound(
    parts: Callable[..., Parts], bound: int, ahead: int
) -> None:
    config = ALIGN.model_copy(
        update={"max_staleness": bound, "ahead": ahead, "steps": 5, "checkpoint_every": 5}
    )
    calls: list[tuple[Any, ...]] = []
    done = align(recorded(in_process(parts(config)), calls), config, Progress())
    staleness = [row["staleness"] for row in done.curve]
    assert max(staleness) == min(bound, 4)
    # What is made ahead is asked for before the step that it overlaps with is trained.
    first = calls.index(("step", None))
    assert [step for method, step in calls[:first] if method == "rollout"] == list(range(ahead + 1))


def test_rollouts_ahead_must_be_within_the_bound() -> None:
    with pytest.raises(ValidationError, match="ahead 2 is more than max_staleness 1"):
        AlignConfig(ahead=2, max_staleness=1)
    with pytest.raises(ValidationError, match="format_k"):
        AlignConfig(format_group=4, format_k=5)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(parts: Callable[..., Parts]) -> Progress:
    return align(in_process(parts()), ALIGN, Progress())


def test_a_resumed_alignment_ends_with_the_same_bits(
    parts: Callable[..., Parts], whole: Progress, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def die(progress: Progress) -> None:
        save_progress(progress, tmp_path)
        raise Killed

    with pytest.raises(Killed):
        align(in_process(parts()), ALIGN, Progress(), checkpoint=die)
    # A kill within the writing leaves the last checkpoint.
    (tmp_path / "align.safetensors.unfinished").write_bytes(b"half")
    restored = load_progress(tmp_path)
    assert restored.step == 3
    done = align(in_process(parts()), ALIGN, restored)
    assert done.trainer is not None
    assert whole.trainer is not None
    assert same(done.trainer.weights, whole.trainer.weights)
    assert same(done.trainer.moments, whole.trainer.moments)
    assert done.curve == whole.curve
    assert done.exposed == whole.exposed


#: Steps that move a policy far, and users of one taste: eight it is aligned with, and the others.
STRONG = ALIGN.model_copy(
    update={
        "steps": 60,
        "preference_weight": 10.0,
        "format_weight": 15.0,
        "learning_rate": 1e-2,
        "checkpoint_every": 60,
        "sampler": "constrained",
    }
)
ALIKE = np.arange(0, 160, GROUPS)
ASKED, HELD_OUT = ALIKE[:8], ALIKE[8:]


def strongly_aligned(
    parts: Callable[..., Parts], deal: Callable[[Any], Any] = lambda score: score
) -> Progress:
    """Aligned with a few users, by the reward or by what is dealt out in its place."""
    given = parts(STRONG)
    few = Parts({**given.rollout, "user_R": ASKED}, given.reward, given.trainer)
    crew = in_process(few)
    crew.reward.score = deal(crew.reward.score)
    return align(crew, STRONG, Progress())


@pytest.fixture(scope="module")
def strong(parts: Callable[..., Parts]) -> Progress:
    return strongly_aligned(parts)


def test_the_policy_moves_towards_the_reward_and_the_legal_ids(strong: Progress) -> None:
    def mean(name: str, rows: slice) -> float:
        return float(np.mean([row[name] for row in strong.curve[rows]]))

    assert mean("reward", slice(-5, None)) > mean("reward", slice(0, 5)) + 0.3
    assert mean("legality", slice(-5, None)) > mean("legality", slice(0, 5)) + 0.2


def test_users_held_out_gain_by_the_true_reward_and_not_by_a_shuffled_one(
    parts: Callable[..., Parts], strong: Progress
) -> None:
    given = parts(STRONG.model_copy(update={"users": len(HELD_OUT), "group": 64}))
    others = in_process(Parts({**given.rollout, "user_R": HELD_OUT}, given.reward, given.trainer))

    def reward(weights: dict[str, torch.Tensor]) -> float:
        (worker,) = others.rollout
        worker.load(weights, 0)
        return float(others.reward.score(worker.rollout(0)).mean())

    before = reward(others.trainer.weights())
    control = strongly_aligned(parts, lambda score: shuffled(score, 0))
    assert strong.trainer is not None
    assert control.trainer is not None
    # 0.31 above, measured, and 0.005 below; of other seeds the control is within 0.02.
    assert reward(strong.trainer.weights) > before + 0.2
    assert abs(reward(control.trainer.weights) - before) < 0.05
    # It was aligned all the same: as legal as the other.
    assert np.mean([row["legality"] for row in control.curve[-5:]]) > 0.9


def test_a_stale_policy_spikes_under_grpo_and_not_under_ecpo(parts: Callable[..., Parts]) -> None:
    norms: dict[str, list[float]] = {"grpo": [], "ecpo": []}
    for objective, found in norms.items():
        config = ALIGN.model_copy(
            update={
                "objective": objective,
                "preference_weight": 1.0,
                "format_weight": 0.0,
                "clip": None,
                "sampler": "constrained",
            }
        )
        for older in (0.0, 2.0, 4.0, 6.0):
            # The policy has become e^older times as fond of every item since it was generated.
            crew = in_process(parts(config))
            made = crew.rollout[0].rollout(0)
            stale = replace(made.preferred, log_old_BG=made.preferred.log_old_BG - older)
            reward_BG = crew.reward.score(made)
            metrics = crew.trainer.step(replace(made, preferred=stale), reward_BG)
            found.append(metrics["gradient_norm"])
            assert (metrics["early_clipped"] > 0.2) == (older > 0)
    grpo, ecpo = norms["grpo"], norms["ecpo"]
    assert grpo[0] == ecpo[0]
    assert grpo[3] > 3 * grpo[2] > 9 * grpo[1]
    # Where clipped, the coefficient is (1 + ε + δ) A, however old the rollout is.
    assert ecpo[1] == pytest.approx(ecpo[2], rel=1e-4) == pytest.approx(ecpo[3], rel=1e-4)
    assert ecpo[3] < 2 * ecpo[0]


def test_both_stages_from_tables_to_an_aligned_recommender(
    world: RewardWorld, recommender: Recommender, trie: Trie, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    give_all(bench, world, recommender, signals=True)
    found = bench.run(train_reward_model, REWARD_STAGE, seed=2)
    assert found["objectives"] == 8
    assert found["reward_p_auc_ctr"] > 0.55
    assert found["judge_p_auc_ctr"] > 0.55
    facts = bench.artifacts["reward_model"].read_json()
    assert set(facts["weights"]) == set(facts["objectives"])
    aligned = bench.run(align_recommender, ALIGN_STAGE, seed=2)
    assert aligned["steps"] == 12
    assert aligned["max_staleness"] <= 2
    curve = bench.artifacts["alignment_curve"].read_table()
    assert curve["step"].to_pylist() == list(range(13))
    # Step 0 and every fourth.
    assert curve["choice_ndcg_at_10"].null_count == 9
    # It is a recommender, of the step that was chosen.
    folder = Path(bench.artifacts["recommender"].path())
    ids = Path(bench.artifacts["semantic_ids"].path())
    loaded = Recommender.load(folder, ids, world.popularity_N)
    # What is loaded to serve keeps no tables of training.
    assert loaded.model.memory is not None
    assert loaded.model.memory.get_buffer("practised_item_FNR").numel() == 0
    assert aligned["best_step"] in (4, 8, 12)
    assert aligned["valid_reward"] > aligned["valid_reward_before"]
    before, after = recommender.model.state_dict(), loaded.model.state_dict()
    assert not same(dict(before), dict(after))
    # The same again from the start, and from the checkpoint that the last run left at its end.
    names = ("recommender", "alignment_curve")
    first = bench.digests(*names)
    bench.run(align_recommender, ALIGN_STAGE, seed=2)
    assert bench.digests(*names) == first
    assert bench.last_run is not None
    assert [step for _, step in bench.last_run.logged] == [0]
    bench.last_run.checkpoints.clear()
    bench.run(align_recommender, ALIGN_STAGE, seed=2)
    assert bench.digests(*names) == first


def test_without_feedback_the_recommender_is_passed_on(
    world: RewardWorld, recommender: Recommender, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    give_all(bench, world, recommender, signals=False)
    found = bench.run(train_reward_model, REWARD_STAGE)
    assert found == {"objectives": 0.0}
    assert bench.last_run is not None
    assert "stays as it is" in bench.last_run.notes[0]
    assert bench.run(align_recommender, ALIGN_STAGE) == {"steps": 0.0, "best_step": 0.0}
    given, passed = (
        Path(bench.artifacts[n].path()) for n in ("pretrained_recommender", "recommender")
    )
    assert {f.name: f.read_bytes() for f in given.iterdir()} == {
        f.name: f.read_bytes() for f in passed.iterdir()
    }


def test_what_a_policy_offers_is_what_its_lists_hold(
    parts: Callable[..., Parts], data: TrainingData, recommender: Recommender
) -> None:
    pscore = parts().reward["pscore"]
    event_U = data.valid.example_targets()[:20]
    users = np.zeros((data.valid.num_users, 1), np.int64)
    made = offer(
        recommender, {"r": pscore}, data.valid, event_U, users, width=12, samples=64, seed=0
    )
    found = made.offered((4, 12))
    assert (found.best["r", 12] >= found.best["r", 4] - 1e-6).all()
    assert (found.best["r", 4] >= found.mean["r", 4] - 1e-6).all()
    ((lists, _),) = recommender.rank(data.valid, event_U, beams=12, top_n=12, batch_size=64)
    for user, event in enumerate(event_U):
        place = np.flatnonzero(lists[user, :10] == data.valid.item_E[event])
        gain = 1 / np.log2(2 + place[0]) if len(place) else 0.0
        assert found.ndcg_U[user] == pytest.approx(gain)
    batch = assemble(data.valid, event_U, data.codes_NQ, MODEL)
    mass = score_catalogue(recommender.model, recommender.trie, batch).exp().sum(1).mean()
    # 20 · 64 samples: three standard deviations
    assert found.legality_U.mean() == pytest.approx(float(mass), abs=0.03)
