"""The figures of the text benchmark from made-up ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from benchmarks.counted_sasrec import CountedSasrec
from benchmarks.onerec_text import CONTROLS, OURS, Ranks, chosen, facts, figures, idle
from components.evaluation.ranking.metrics import gains, target_ranks
from components.evaluation.ranking.rankers import SasrecRanker
from components.training.onerec.config import OneRecConfig
from components.training.onerec.experts import MixtureOfExperts
from components.training.onerec.model import OneRec
from components.training.sasrec.config import SasrecConfig
from components.training.sasrec.model import Sasrec

USERS = 400
ITEMS = 40


def ranks_with_hits(share: float, seed: int) -> Ranks:
    """Targets in first place for a share of the users, nowhere for the others."""
    hit_U = np.arange(USERS) < round(share * USERS)
    return Ranks(np.random.default_rng(seed).permutation(hit_U).astype(np.int32))


def test_figures_are_means_and_paired_differences() -> None:
    shares = {OURS: 0.5, "sasrec": 0.4, "tiger_rq_vae": 0.1, "cornac_tiger": 0.3}
    shares |= {"onerec_shuffled": 0.35, "without_memory": 0.2, "without_memory_shuffled": 0.1}
    shares |= {"ids_alone": 0.2, "ids_alone_shuffled": 0.05}
    ranks = {
        name: [ranks_with_hits(share, seed) for seed in (0, 1)] for name, share in shares.items()
    }
    found = {result.name: result for result in figures(ranks)}
    assert found["onerec_ndcg_at_10"].ours == pytest.approx(0.5)
    assert found["onerec_ndcg_at_10"].reference == pytest.approx(0.3)  # the better TIGER
    assert found["sasrec_hr_at_10"].reference == pytest.approx(0.5)
    gap = found["onerec_minus_sasrec_ndcg_at_10"]
    assert gap.ours == pytest.approx(0.1)
    assert 0 < gap.low < gap.ours < gap.high < 0.2
    for control, (base, lost) in {
        "onerec_shuffled": (OURS, 0.3),
        "without_memory_shuffled": ("without_memory", 0.5),
        "ids_alone_shuffled": ("ids_alone", 0.75),
    }.items():
        assert CONTROLS[control] == base
        assert found[f"{control}_loses_of_ndcg_at_10"].ours == pytest.approx(lost)
    assert found["onerec_hr_at_5"].n == found["onerec_shuffled_loses_of_hr_at_10"].n == 2


def test_masked_figures_are_of_methods_whose_lists_are_known_without_history() -> None:
    few = Ranks(ranks_with_hits(0.1, 1).rank_U, ranks_with_hits(0.25, 0).rank_U)
    whole = {name: [few] for name in (*CONTROLS, *CONTROLS.values(), "tiger_rq_vae")}
    found = {r.name: r for r in figures(whole | {"cornac_tiger": [ranks_with_hits(0.5, 0)]})}
    assert found["onerec_ndcg_at_10"].ours == pytest.approx(0.1)
    assert found["onerec_masked_ndcg_at_10"].ours == pytest.approx(0.25)
    assert "cornac_tiger_masked_ndcg_at_10" not in found


def test_experts_that_a_position_is_not_sent_to_are_idle(tmp_path: Path) -> None:
    config = OneRecConfig(num_items=ITEMS, d_model=16, heads=2, experts=4, active_experts=1)
    model = OneRec(config)
    (tmp_path / "config.json").write_text(json.dumps({"model": config.model_dump()}))
    weights = {name: x.numpy() for name, x in model.state_dict().items()}
    moe = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
    assert len(moe) == config.decoder_layers
    expected = sum(3 * (m.gate_up[0].numel() + m.down[0].numel()) for m in moe)
    assert idle(Folder(tmp_path), weights) == expected
    dense = config.model_copy(update={"experts": 0})
    (tmp_path / "config.json").write_text(json.dumps({"model": dense.model_dump()}))
    assert idle(Folder(tmp_path), weights) == 0


def test_a_part_of_the_arms_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = {OURS: 1, "tiger_rq_vae": 2, "experts": 3}
    assert chosen(arms) == arms
    monkeypatch.setenv("REELFLOW_BENCH_ARMS", "experts,cornac_tiger")
    assert chosen(arms) == {OURS: 1, "experts": 3}
    assert chosen({"cornac_tiger": 4, "cornac_gru4rec": 5}) == {"cornac_tiger": 4}
    # Without a TIGER and without controls there are figures all the same.
    found = {r.name: r for r in figures({OURS: [ranks_with_hits(0.5, 0)]})}
    assert found["onerec_ndcg_at_10"].reference is None


def test_facts_are_means_over_seeds() -> None:
    (found,) = facts({OURS: {"collision_rate": [0.25, 0.35]}})
    assert found.name == "onerec_collision_rate"
    assert (found.ours, found.low, found.high) == pytest.approx((0.3, 0.25, 0.35))
    assert not found.higher_is_better


def test_intervals_are_paired() -> None:
    """Two methods that hit nearly the same users differ with near certainty, if by little."""
    ours = np.zeros(USERS, np.int32)
    ours[:200] = 1
    theirs = ours.copy()
    theirs[:20] = 0
    shared = {"tiger_rq_vae": [Ranks(theirs)]} | {name: [Ranks(ours)] for name in CONTROLS}
    shared |= {name: [Ranks(ours)] for name in CONTROLS.values()}
    ranks = {OURS: [Ranks(ours)], **shared}
    gap = {r.name: r for r in figures(ranks)}["onerec_minus_tiger_rq_vae_hr_at_10"]
    assert gap.ours == pytest.approx(0.05)
    assert gap.high - gap.low < 0.05  # unpaired it would be about 0.14


class Folder:
    """An artifact's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / name


class Examples:
    """Requests as an artifact gives them: item i is followed by i + 1, or by anything."""

    def __init__(self, users: int, follows: bool) -> None:
        rng = np.random.default_rng(0)
        histories = [rng.integers(0, ITEMS, rng.integers(1, 6)).tolist() for _ in range(users)]
        target = rng.integers(0, ITEMS, users)
        self.table = pa.table(
            {
                "user_id": rng.permutation(users),
                "item_index": pa.array(histories, pa.list_(pa.int32())),
                "positive": [[True] * len(items) for items in histories],
                "target": [(h[-1] + 1) % ITEMS for h in histories] if follows else target,
            }
        )

    def batches(self, batch_size: int) -> list[pa.RecordBatch]:
        return self.table.to_batches(max_chunksize=batch_size)


@pytest.fixture
def counted() -> CountedSasrec:
    torch.manual_seed(0)
    model = Sasrec(SasrecConfig(num_items=ITEMS, width=8, heads=2, max_length=8)).eval()
    item_N = torch.arange(ITEMS)
    # Each item was followed by the next one six times of eight, and by another one.
    item_NR = torch.stack([(item_N + 1) % ITEMS, (item_N + 5) % ITEMS], 1).int()
    return CountedSasrec(
        model, item_NR, torch.tensor([[6.0, 2.0]]).repeat(ITEMS, 1), torch.full((ITEMS,), 8.0), 3
    )


def test_counts_of_the_newest_events_are_shares_that_fade(counted: CountedSasrec) -> None:
    (examples,) = Examples(1, follows=True).batches(1)
    examples = examples.set_column(
        1, "item_index", pa.array([[30, 0, 10, 20]], pa.list_(pa.int32()))
    )
    found_N = counted.counted(examples, 0.5)[0]
    expected = {21: 4 / 7 * 6 / 8, 25: 4 / 7 * 2 / 8, 11: 2 / 7 * 6 / 8, 15: 2 / 7 * 2 / 8}
    expected |= {1: 1 / 7 * 6 / 8, 5: 1 / 7 * 2 / 8}
    assert {int(n): float(found_N[n]) for n in found_N.nonzero()} == pytest.approx(expected)
    assert counted.counted(examples, 0.0)[0].nonzero().flatten().tolist() == [21, 25]


def test_sasrec_takes_from_the_counts_what_validation_says(counted: CountedSasrec) -> None:
    # Where the next item follows, the counts of the newest event alone put it first.
    share, fading = counted.chosen(Examples(300, follows=True))
    assert share > 0
    assert fading < 1
    test = Examples(200, follows=True)
    rank_U = counted.ranks({"valid_examples": Examples(300, True), "test_examples": test})
    assert gains(rank_U, 10).mean() > 0.9
    # Where nothing tells, it is SASRec's list or little else; by user id in any case.
    given = {"valid_examples": Examples(300, False), "test_examples": Examples(200, False)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.counted_sasrec.SHARES", (0.0,))
        found_U = counted.ranks(given)
    table = given["test_examples"].table
    (batch,) = table.to_batches()
    alone_U = target_ranks(SasrecRanker(counted.model).rank(batch, 20), table["target"].to_numpy())
    assert found_U.tolist() == alone_U[np.argsort(table["user_id"].to_numpy())].tolist()
