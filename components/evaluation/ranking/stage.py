"""The `evaluate_recommender` stage: the recommender beside its baselines, on the same users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from components.pipeline.params_base import Params, Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    from components.evaluation.ranking.rankers import Ranker

OURS = "onerec"
CUTOFFS = (5, 10, 20)
HEADLINE = 10
#: Fewer distinct items than this share of the catalogue in all lists: an encoder that ignores
#: its input looks like that.
COLLAPSE_SHARE = 0.01
CONTROL_USERS = 512


class EvaluateRecommenderParams(Params):
    """How test examples are ranked."""

    seed: Seed = Field(default=0, description="bootstrap and the swapped-history control")
    beams: int = Field(default=128, ge=20, le=8192, description="beam width W")
    max_users: int = Field(
        default=1_000_000, ge=1, description="test users at most, spread over all of them"
    )


@stage(
    inputs=(
        "catalogue",
        "train_sequences",
        "valid_examples",
        "test_examples",
        "semantic_ids",
        "recommender",
        "sasrec",
    ),
    outputs=("evaluation", "recommendations"),
    params=EvaluateRecommenderParams,
)
def evaluate_recommender(
    params: EvaluateRecommenderParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Ranks the full catalogue for every test user and compares with the baselines."""
    import numpy as np
    import pyarrow as pa

    from components.evaluation.ranking import comparison
    from components.evaluation.ranking.rankers import OneRecRanker, seen_items, shuffled_histories
    from components.pipeline.errors import DataContractError

    total = inputs["test_examples"].rows or 0
    if not total:
        raise DataContractError(
            "there is no test example",
            where="artifact 'test_examples'",
            remedy="choose split.test_from so that users have events before and after it",
        )
    chosen = np.unique(np.linspace(0, total - 1, min(total, params.max_users)).astype(int))
    rankers = load_rankers(inputs, params.beams)
    tally = comparison.Tally(list(rankers), CUTOFFS)
    control: list[float] = []
    k = max(CUTOFFS)
    recommendation_schema = pa.schema(
        [
            ("user_id", pa.int64()),
            ("item_index", pa.list_(pa.int32())),
            ("score", pa.list_(pa.float32())),
        ]
    )
    first = 0
    with (
        outputs["recommendations"].writer(recommendation_schema) as writer,
        run.progress(len(chosen), "ranking test users") as bar,
    ):
        for batch in inputs["test_examples"].batches(batch_size=1024):
            rows = chosen[(chosen >= first) & (chosen < first + len(batch))] - first
            first += len(batch)
            if not len(rows):
                continue
            examples = batch.take(pa.array(rows))
            for name, ranker in rankers.items():
                # Masking strikes out what a user saw: longer lists keep K of them filled.
                lists = ranker.rank(examples, 2 * k)
                tally.add(name, examples, lists, seen_items(lists, examples))
                if name != OURS:
                    continue
                assert isinstance(ranker, OneRecRanker)
                assert ranker.scores_BK is not None
                writer.write_batch(
                    _recommendations(
                        examples, lists[:, :k], ranker.scores_BK[:, :k], recommendation_schema
                    )
                )
                if len(control) * 1024 < CONTROL_USERS:
                    few = examples.slice(0, CONTROL_USERS)
                    swapped = ranker.rank(shuffled_histories(few, params.seed), HEADLINE)
                    control.append(comparison.mean_overlap(lists[: len(few)], swapped, HEADLINE))
            bar.advance(len(rows))

    catalogue_size = inputs["catalogue"].rows or 0
    statistics = inputs["semantic_ids"].read_json()
    collision_rate = statistics["colliding_items"] / statistics["num_items"]
    summary = comparison.summarise(tally, OURS, params.seed)
    overlap = float(np.mean(control))
    distinct = tally.distinct_items(OURS, HEADLINE)
    outputs["evaluation"].write_table(tally.table())
    outputs["evaluation"].write_json(
        {
            **summary,
            "collision_rate": collision_rate,
            "catalogue_size": catalogue_size,
            "beams": params.beams,
            "history_masked": False,
            "swapped_history_overlap_at_10": overlap,
            "alarms": _alarms(distinct, catalogue_size, overlap),
        }
    )
    metrics = comparison.headline(summary, OURS)
    return {
        **metrics,
        "users": float(len(chosen)),
        "collision_rate": collision_rate,
        "distinct_items_at_10": float(distinct),
        "coverage_at_10": distinct / catalogue_size,
        "swapped_history_overlap_at_10": overlap,
    }


def load_rankers(inputs: Inputs, beams: int) -> dict[str, Ranker]:
    """All methods by name, ours first; counting baselines choose what to count on validation."""
    import json
    from pathlib import Path

    from components.evaluation.ranking import comparison
    from components.evaluation.ranking.rankers import OneRecRanker, SasrecRanker
    from components.training.onerec.recommender import Recommender, popularity
    from components.training.sasrec.config import SasrecConfig
    from components.training.sasrec.model import Sasrec

    catalogue = inputs["catalogue"].read_table(["train_count", "train_positive_count"])
    events = catalogue["train_count"].to_numpy()
    positives = catalogue["train_positive_count"].to_numpy()
    recommender = Recommender.load(
        Path(inputs["recommender"].path()),
        Path(inputs["semantic_ids"].path()),
        popularity(positives, events),
    )
    sasrec = Sasrec(
        SasrecConfig(**json.loads(Path(inputs["sasrec"].path("config.json")).read_text()))
    )
    sasrec.load_state_dict(inputs["sasrec"].load_state_dict())
    valid = comparison.sample_examples(inputs["valid_examples"])
    return {
        OURS: OneRecRanker(recommender, beams),
        "sasrec": SasrecRanker(sasrec.eval()),
        "bigram": comparison.choose_bigram(
            inputs["train_sequences"], len(events), events, positives, valid
        ),
        "popularity": comparison.choose_popularity(events, positives, valid),
    }


def _recommendations(examples: Any, lists: Any, scores: Any, schema: Any) -> Any:
    import pyarrow as pa

    known = lists >= 0
    columns = {
        "user_id": examples.column("user_id"),
        "item_index": [row[ok] for row, ok in zip(lists, known)],
        "score": [row[ok] for row, ok in zip(scores, known)],
    }
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def _alarms(distinct: int, catalogue_size: int, overlap: float) -> list[str]:
    alarms = []
    if distinct < max(2 * HEADLINE, COLLAPSE_SHARE * catalogue_size):
        alarms.append(
            f"only {distinct} distinct items are recommended to all users: the model may ignore "
            "its input"
        )
    if overlap > 0.9:
        alarms.append(
            f"with another user's history {100 * overlap:.0f} % of the recommendations stay: the "
            "model hardly reads it"
        )
    return alarms
