"""`evaluate_recommender` on a small real chain of stages: ranks, intervals, lists, controls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from pyarrow import csv
from stage_harness import Bench

from components.curation.item_features.config import ItemFeaturesParams
from components.curation.item_features.stage import item_features
from components.data.contracts import INTERACTIONS, ITEMS
from components.data.split_stage import SplitParams, split
from components.evaluation.ranking import comparison
from components.evaluation.ranking.rankers import (
    BigramRanker,
    PopularityRanker,
    SasrecRanker,
    last_items,
    seen_items,
    shuffled_histories,
)
from components.evaluation.ranking.stage import (
    CONTROL_MIN_USERS,
    EvaluateRecommenderParams,
    _alarms,
    evaluate_recommender,
    load_rankers,
)
from components.pipeline.artifacts import Inputs
from components.pipeline.errors import CorruptArtifactError
from components.training.onerec.config import MemoryConfig, OneRecConfig
from components.training.onerec.features import Features
from components.training.onerec.model import OneRec
from components.training.onerec.recommender import trained_on
from components.training.onerec.tokenizer.stage import (
    AlignItemsParams,
    SemanticIdsParams,
    align_items,
    semantic_ids,
)
from components.training.sasrec.config import SasrecGrid, SasrecParams
from components.training.sasrec.stage import train_sasrec

ITEM_COUNT, USERS, CYCLE = 40, 60, 8
METHODS = {"onerec", "sasrec", "bigram", "popularity"}


def walk(seed: int) -> pa.Table:
    """Users go round one of five cycles of items, with a slip now and then."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {"user_id": [], "item_id": [], "timestamp": []}
    for user in range(USERS):
        cycle, place = rng.integers(0, ITEM_COUNT // CYCLE), rng.integers(0, CYCLE)
        for step in range(int(rng.integers(4, 14))):
            place = (place + 1 + (rng.random() < 0.15)) % CYCLE
            rows["user_id"].append(user)
            rows["item_id"].append(int(cycle * CYCLE + place))
            rows["timestamp"].append(1000 * step)
    count = len(rows["user_id"])
    return pa.table(
        [
            pa.array(rows[f.name], pa.int64()).cast(f.type)
            if f.name in rows
            else pa.nulls(count, f.type)
            for f in INTERACTIONS.schema
        ],
        schema=INTERACTIONS.schema,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """All stages before the evaluation, the recommender with random weights."""
    bench = Bench(tmp_path_factory.mktemp("ranking"))
    items = pa.table(
        [
            pa.array(range(ITEM_COUNT), f.type)
            if f.name == "item_id"
            else pa.nulls(ITEM_COUNT, f.type)
            for f in ITEMS.schema
        ],
        schema=ITEMS.schema,
    )
    bench.give("interactions", lambda o: o.write_table(walk(0)))
    bench.give("items", lambda o: o.write_table(items))
    source = {"split": {"protocol": "leave_one_out", "valid_from": None, "test_from": None}}
    bench.give("source", lambda o: o.write_json(source))
    bench.run(split, SplitParams())
    bench.run(item_features, ItemFeaturesParams(dimension=8, block_dimension=8, token_dimension=8))
    bench.run(align_items, AlignItemsParams(steps=1, pairs=2))
    bench.run(semantic_ids, SemanticIdsParams(codebook_size=4, method="plain"))
    grid = SasrecGrid(learning_rate=(5e-3,), dropout=(0.1,), width=(16,), tied=(False,))
    bench.run(
        train_sasrec, SasrecParams(grid=grid, batch_size=16, max_epochs=15, patience=15, workers=1)
    )
    give_recommender(bench)
    bench.run(evaluate_recommender, EvaluateRecommenderParams(beams=32))
    return bench


def give_recommender(bench: Bench, **told: Any) -> None:
    """An untrained model of the bench's semantic ids; ``told`` is what it says otherwise of them.

    None: it does not say.
    """
    torch.manual_seed(0)
    config = OneRecConfig(
        codebook_size=4,
        d_model=16,
        heads=2,
        ffn=16,
        feature_width=4,
        num_items=ITEM_COUNT,
        memory=MemoryConfig(successors=0),
    )
    model = OneRec(config)

    def fill(output: Any) -> None:
        output.save_state_dict({name: w.clone() for name, w in model.state_dict().items()})
        ids = bench.artifacts["semantic_ids"]
        said = trained_on(ids.read_json(), ids.load_arrays()["codes"]) | told
        record = {"model": config.model_dump(mode="json"), "targets": "positive", **said}
        output.write_json({k: v for k, v in record.items() if v is not None}, "config.json")
        Features.none(ITEM_COUNT).save(Path(output.path()))

    bench.give("recommender", fill)


def inputs(bench: Bench) -> Inputs:
    return Inputs(bench.artifacts, [])


def unseen(bench: Bench) -> pa.RecordBatch:
    return bench.artifacts["test_examples"].read_table().combine_chunks().to_batches()[0]


def ranks_by_user(bench: Bench, method: str, column: str = "rank") -> dict[int, int]:
    table = bench.artifacts["evaluation"].read_table()
    return {row["user_id"]: row[column] for row in table.to_pylist() if row["method"] == method}


def test_every_test_user_has_one_rank_under_every_method(bench: Bench) -> None:
    users = set(bench.artifacts["test_examples"].read_table()["user_id"].to_pylist())
    for method in METHODS:
        assert set(ranks_by_user(bench, method)) == users
    table = bench.artifacts["evaluation"].read_table()
    assert len(table) == len(METHODS) * len(users)


def test_popularity_and_bigram_ranks_equal_counting_by_hand(bench: Bench) -> None:
    catalogue = bench.artifacts["catalogue"].read_table()
    counts = catalogue["train_count"].to_pylist()
    popular = sorted(range(ITEM_COUNT), key=lambda i: (-counts[i], i))
    pairs = np.zeros((ITEM_COUNT, ITEM_COUNT), int)
    for row in bench.artifacts["train_sequences"].read_table()["item_index"].to_pylist():
        for first, second in pairwise(row):
            pairs[first, second] += 1
    by_hand: dict[str, dict[int, int]] = {"popularity": {}, "bigram": {}}
    for row in unseen(bench).to_pylist():
        last, target, user = row["item_index"][-1], row["target"], row["user_id"]
        followers = sorted(popular, key=lambda i: -pairs[last, i])
        by_hand["popularity"][user] = popular.index(target) + 1
        by_hand["bigram"][user] = followers.index(target) + 1
    for method, expected in by_hand.items():
        ours = ranks_by_user(bench, method)
        assert ours == {user: rank if rank <= 20 else 0 for user, rank in expected.items()}


def test_sasrec_ranks_equal_scoring_one_user_at_a_time(bench: Bench) -> None:
    ranker = load_rankers(inputs(bench), 20)["sasrec"]
    assert isinstance(ranker, SasrecRanker)
    expected = {}
    for row in unseen(bench).to_pylist():
        items = torch.tensor([row["item_index"][-50:]])
        with torch.no_grad():
            scores = ranker.model.last_scores(
                items, torch.tensor([row["positive"][-50:]]), torch.tensor([items.shape[1]])
            )[0]
        rank = 1 + int((scores > scores[row["target"]]).sum())
        expected[row["user_id"]] = rank if rank <= 20 else 0
    assert ranks_by_user(bench, "sasrec") == expected


def test_reported_metrics_are_those_of_the_published_ranks(bench: Bench) -> None:
    record = bench.artifacts["evaluation"].read_json()
    for method in METHODS:
        for group, column in (("metrics", "rank"), ("masked_metrics", "masked_rank")):
            rank = np.array(list(ranks_by_user(bench, method, column).values()))
            for k in (5, 10, 20):
                hit = (rank >= 1) & (rank <= k)
                gain = np.where(hit, 1 / np.log2(1 + np.maximum(rank, 1)), 0)
                for metric, value in (("hr", hit.mean()), ("ndcg", gain.mean())):
                    estimate = record["methods"][method][group][f"{metric}_at_{k}"]
                    assert estimate["value"] == pytest.approx(value)
                    assert estimate["low"] <= estimate["value"] <= estimate["high"]


def test_charts_by_method_and_by_history_are_those_of_the_published_ranks(bench: Bench) -> None:
    evaluation = bench.artifacts["evaluation"]
    estimates = evaluation.read_json()["methods"]
    by_method = csv.read_csv(evaluation.path("methods.csv")).to_pylist()
    assert {row["method"] for row in by_method} == METHODS
    for row in by_method:
        method = row.pop("method")
        assert row == {m: e["value"] for m, e in estimates[method]["metrics"].items()}

    length = {row["user_id"]: len(row["item_index"]) for row in unseen(bench).to_pylist()}
    groups = csv.read_csv(evaluation.path("history.csv")).to_pylist()
    edges = [row["history_from"] for row in groups]
    assert edges == sorted(set(edges))
    assert sum(row["users"] for row in groups) == len(length)
    for method in METHODS:
        ranks = ranks_by_user(bench, method)
        for row, end in zip(groups, [*edges[1:], np.inf], strict=True):
            own = [ranks[u] for u, events in length.items() if row["history_from"] <= events < end]
            gain = [1 / np.log2(1 + rank) if 0 < rank <= 10 else 0.0 for rank in own]
            assert row["users"] == len(own)
            assert row[method] == pytest.approx(np.mean(gain))


def test_random_weights_lose_to_the_bigram_with_an_interval_below_zero(bench: Bench) -> None:
    record = bench.artifacts["evaluation"].read_json()
    gap = next(
        d
        for d in record["differences"]
        if (d["metric"], d["method"], d["baseline"]) == ("ndcg_at_10", "onerec", "bigram")
    )
    own, other = (
        record["methods"][m]["metrics"]["ndcg_at_10"]["value"] for m in ("onerec", "bigram")
    )
    assert gap["value"] == pytest.approx(own - other)
    assert gap["high"] < 0
    ranks = [np.array(list(ranks_by_user(bench, m).values())) for m in ("bigram", "popularity")]
    assert (ranks[0] > 0).mean() > (ranks[1] > 0).mean()


def test_recommendations_are_legal_distinct_and_best_first(bench: Bench) -> None:
    rows = bench.artifacts["recommendations"].read_table().to_pylist()
    assert len(rows) == len(unseen(bench))
    for row in rows:
        assert len(set(row["item_index"])) == len(row["item_index"]) <= 20
        assert all(0 <= item < ITEM_COUNT for item in row["item_index"])
        assert row["score"] == sorted(row["score"], reverse=True)


def test_ranks_of_the_recommender_are_places_in_its_published_lists(bench: Bench) -> None:
    target = {r["user_id"]: r["target"] for r in unseen(bench).to_pylist()}
    ranks = ranks_by_user(bench, "onerec")
    for row in bench.artifacts["recommendations"].read_table().to_pylist():
        wanted, listed = target[row["user_id"]], row["item_index"]
        assert ranks[row["user_id"]] == (listed.index(wanted) + 1 if wanted in listed else 0)


def test_masked_ranks_are_places_among_unseen_items(bench: Bench) -> None:
    masked = ranks_by_user(bench, "bigram", "masked_rank")
    ranker = load_rankers(inputs(bench), 20)["bigram"]
    examples = unseen(bench)
    lists = ranker.rank(examples, ITEM_COUNT).tolist()
    for row, ranked in zip(examples.to_pylist(), lists, strict=True):
        left = [i for i in ranked if i not in row["item_index"]]
        place = left.index(row["target"]) + 1 if row["target"] in left else 0
        assert masked[row["user_id"]] == (place if place <= 20 else 0)


def test_subset_of_users_is_a_subset_of_the_same_ranks(bench: Bench, tmp_path: Path) -> None:
    few = Bench(tmp_path)
    few.artifacts = dict(bench.artifacts)
    metrics = few.run(evaluate_recommender, EvaluateRecommenderParams(beams=32, max_users=15))
    assert metrics["users"] == 15
    for method in METHODS:
        subset = ranks_by_user(few, method)
        assert len(subset) == 15
        assert subset.items() <= ranks_by_user(bench, method).items()


def test_collisions_are_told_before_and_after_items_were_told_apart(bench: Bench) -> None:
    record = bench.artifacts["evaluation"].read_json()
    ids = bench.artifacts["semantic_ids"].read_json()
    assert record["collision_rate"] == ids["colliding_items"] / ITEM_COUNT
    assert record["collision_rate_before_repair"] == ids["colliding_before"] / ITEM_COUNT
    assert record["collision_rate_before_repair"] > record["collision_rate"]


@pytest.mark.parametrize(("users", "measured"), [(CONTROL_MIN_USERS - 1, False), (30, True)])
def test_histories_are_swapped_among_users_enough_wherever_they_lie(
    bench: Bench, tmp_path: Path, users: int, measured: bool
) -> None:
    few = Bench(tmp_path)
    # The chosen users lie in many batches of the table: a control within one would be of few.
    many = pa.concat_tables([bench.artifacts["test_examples"].read_table()] * 80)
    few.artifacts = dict(bench.artifacts)
    few.give("test_examples", lambda output: output.write_table(many))
    metrics = few.run(evaluate_recommender, EvaluateRecommenderParams(beams=20, max_users=users))
    record = few.artifacts["evaluation"].read_json()
    assert len(many) > 4 * 1024
    assert ("swapped_history_overlap_at_10" in metrics) is measured
    assert (record["swapped_history_overlap_at_10"] is not None) is measured


@pytest.mark.parametrize(
    ("distinct", "catalogue", "users"),
    [(3, 3, 500), (10, 10, 500), (12, 15, 500), (10, 4000, 1), (19, 4000, 2), (120, 10**6, 1000)],
)
def test_what_few_users_or_items_allow_is_no_collapse(
    distinct: int, catalogue: int, users: int
) -> None:
    assert _alarms(distinct, catalogue, users, None) == []


@pytest.mark.parametrize(
    ("distinct", "catalogue", "users"),
    [(10, 60, 40), (12, 4000, 500), (30, 4000, 500), (60, 10**6, 1000)],
)
def test_the_same_items_for_everybody_are_a_collapse(
    distinct: int, catalogue: int, users: int
) -> None:
    (alarm,) = _alarms(distinct, catalogue, users, 0.2)
    assert alarm.startswith(f"only {distinct} distinct items")
    assert len(_alarms(distinct, catalogue, users, 0.95)) == 2


def test_validation_samples_are_spread_over_all_users() -> None:
    @dataclass
    class Table:
        """What an artifact tells of a table that is read in batches."""

        table: pa.Table

        @property
        def rows(self) -> int:
            return int(self.table.num_rows)

        def batches(self, batch_size: int) -> list[pa.RecordBatch]:
            return list(self.table.to_batches(max_chunksize=batch_size))

    def sample(users: int) -> Any:
        table: Any = Table(pa.table({"user_id": np.arange(users)}))
        return comparison.sample_examples(table)

    taken = sample(50_000)["user_id"].to_numpy()
    assert len(taken) == comparison.VALID_USERS
    assert (taken[0], taken[-1]) == (0, 49_999)
    assert set(np.diff(taken)) <= {25, 26}
    assert sample(7)["user_id"].to_pylist() == list(range(7))
    assert sample(0) is None


def test_model_of_other_semantic_ids_is_refused(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    other.artifacts = dict(bench.artifacts)
    give_recommender(other, semantic_ids_version="0123456789abcdef")
    with pytest.raises(CorruptArtifactError, match="semantic ids 0123456789abcdef"):
        other.run(evaluate_recommender, EvaluateRecommenderParams(beams=32))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"collisions": "keep"}, "other semantic ids of the same codebooks"),
        ({"collisions": "extra_digit"}, "trained on semantic ids"),
        ({"codebook_size": 5}, "trained on semantic ids"),
    ],
)
def test_codes_that_the_model_was_not_trained_on_are_refused(
    bench: Bench, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    """Whatever the rule for collisions made of one quantiser."""
    other = Bench(tmp_path)
    other.artifacts = dict(bench.artifacts)
    params = {"codebook_size": 4, "method": "plain", **changed}
    other.run(semantic_ids, SemanticIdsParams(**params))
    codes = [b.artifacts["semantic_ids"].load_arrays()["codes"] for b in (bench, other)]
    assert not np.array_equal(*codes)
    with pytest.raises(CorruptArtifactError, match=rf"{message}(?s:.*)reelflow run recommend"):
        other.run(evaluate_recommender, EvaluateRecommenderParams(beams=32))


def test_sizes_of_other_semantic_ids_are_named(bench: Bench, tmp_path: Path) -> None:
    """Though the model says that it knows them: a record that somebody wrote by hand."""
    for wrong in ({"num_items": 3}, {"num_levels": 2}, {"codebook_size": 5}):
        other = Bench(tmp_path / next(iter(wrong)))
        other.artifacts = dict(bench.artifacts)
        ((name, size),) = wrong.items()
        config = bench.artifacts["recommender"].read_json("config.json")["model"]
        give_recommender(other, model=config | wrong)
        with pytest.raises(
            CorruptArtifactError, match=rf"{name} {size}, these have {config[name]}"
        ):
            other.run(evaluate_recommender, EvaluateRecommenderParams(beams=32))


def test_a_model_of_before_says_that_it_does_not_know(bench: Bench, tmp_path: Path) -> None:
    other = Bench(tmp_path)
    other.artifacts = dict(bench.artifacts)
    give_recommender(other, semantic_ids_codes=None)
    with pytest.raises(CorruptArtifactError, match="does not say which semantic ids its items had"):
        other.run(evaluate_recommender, EvaluateRecommenderParams(beams=32))


def example_batch(
    items: list[list[int]], positive: list[list[bool]], target: list[int]
) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(
        {
            "user_id": pa.array(range(len(items)), pa.int64()),
            "item_index": pa.array(items, pa.list_(pa.int32())),
            "positive": pa.array(positive, pa.list_(pa.bool_())),
            "target": pa.array(target, pa.int32()),
            "target_timestamp_ms": pa.array([0] * len(items), pa.int64()),
        }
    )


def random_batch(users: int = 50) -> pa.RecordBatch:
    rng = np.random.default_rng(0)
    items = [rng.integers(0, ITEM_COUNT, rng.integers(0, 9)).tolist() for _ in range(users)]
    flags = [(rng.random(len(row)) < 0.4).tolist() for row in items]
    return example_batch(items, flags, rng.integers(0, ITEM_COUNT, users).tolist())


def test_last_item_is_that_of_the_history_or_of_its_positive_part() -> None:
    batch = random_batch()
    for positive in (False, True):
        expected = []
        for row in batch.to_pylist():
            kept = [
                i
                for i, ok in zip(row["item_index"], row["positive"], strict=True)
                if ok or not positive
            ]
            expected.append(kept[-1] if kept else -1)
        assert last_items(batch, positive).tolist() == expected


def test_seen_entries_are_those_of_the_own_history() -> None:
    batch = random_batch()
    rng = np.random.default_rng(1)
    lists: npt.NDArray[np.int32] = rng.integers(-1, ITEM_COUNT, (50, 12)).astype(np.int32)
    expected = [
        [item >= 0 and item in row["item_index"] for item in ranked]
        for row, ranked in zip(batch.to_pylist(), lists.tolist(), strict=True)
    ]
    assert seen_items(lists, batch).tolist() == expected


def test_swapped_histories_keep_targets_and_move_whole_histories() -> None:
    batch = random_batch()
    swapped = shuffled_histories(batch, seed=0)
    assert swapped.column("target").equals(batch.column("target"))
    before = [(r["item_index"], r["positive"]) for r in batch.to_pylist()]
    after = [(r["item_index"], r["positive"]) for r in swapped.to_pylist()]
    assert sorted(map(str, before)) == sorted(map(str, after))
    assert sum(a != b for a, b in zip(before, after, strict=True)) > 40


def test_no_ranker_looks_at_the_target(bench: Bench) -> None:
    examples = unseen(bench)
    target = pa.array(np.roll(examples.column("target").to_numpy(), 1))
    place = examples.schema.get_field_index("target")
    other = examples.set_column(place, examples.schema.field(place), target)
    rankers = load_rankers(inputs(bench), 20)
    assert isinstance(rankers["bigram"], BigramRanker)
    assert isinstance(rankers["popularity"], PopularityRanker)
    for name, ranker in rankers.items():
        assert np.array_equal(ranker.rank(examples, 20), ranker.rank(other, 20)), name
