"""The `evaluate_recommender` stage: the recommender beside its baselines, on the same users.

Shapes: B examples of a batch, K length of a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from components.pipeline.params_base import Params, Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    import numpy.typing as npt

    from components.evaluation.ranking.rankers import Ranker

OURS = "onerec"
CUTOFFS = (5, 10, 20)
HEADLINE = 10
#: Fewer distinct items than this share of those that could be shown: an encoder that ignores its
#: input looks like that.
COLLAPSE_SHARE = 0.01
#: Users whose histories are swapped, at most, and at least for the control to say anything.
CONTROL_USERS, CONTROL_MIN_USERS = 512, 20


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
    from pyarrow import csv

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
    chosen = comparison.spread(total, params.max_users)
    rankers = load_rankers(inputs, params.beams)
    tally = comparison.Tally(list(rankers), CUTOFFS)
    control: list[tuple[pa.RecordBatch, npt.NDArray[np.int32]]] = []
    control_users = 0
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
                few = examples.slice(0, CONTROL_USERS - control_users)
                control.append((few, lists[: len(few)]))
                control_users += len(few)
            bar.advance(len(rows))

    catalogue_size = inputs["catalogue"].rows or 0
    overlap = None
    if control_users >= CONTROL_MIN_USERS and catalogue_size >= 2 * HEADLINE:
        examples = pa.concat_batches([few for few, _ in control])
        swapped = rankers[OURS].rank(shuffled_histories(examples, params.seed), HEADLINE)
        own = np.concatenate([lists for _, lists in control])
        overlap = comparison.mean_overlap(own, swapped, HEADLINE)
    statistics = inputs["semantic_ids"].read_json()
    collisions = {
        "collision_rate": statistics["colliding_items"] / statistics["num_items"],
        "collision_rate_before_repair": statistics["colliding_before"] / statistics["num_items"],
    }
    summary = comparison.summarise(tally, OURS, params.seed)
    distinct = tally.distinct_items(OURS, HEADLINE)
    outputs["evaluation"].write_table(tally.table())
    csv.write_csv(comparison.by_method(summary), outputs["evaluation"].path("methods.csv"))
    by_history = comparison.by_history(tally, HEADLINE)
    csv.write_csv(by_history, outputs["evaluation"].path("history.csv"))
    outputs["evaluation"].write_json(
        {
            **summary,
            **collisions,
            "catalogue_size": catalogue_size,
            "beams": params.beams,
            "history_masked": False,
            "swapped_history_overlap_at_10": overlap,
            "alarms": _alarms(distinct, catalogue_size, len(chosen), overlap),
        }
    )
    metrics = comparison.headline(summary, OURS)
    if overlap is not None:
        metrics["swapped_history_overlap_at_10"] = overlap
    return {
        **metrics,
        "users": float(len(chosen)),
        **collisions,
        "distinct_items_at_10": float(distinct),
        "coverage_at_10": distinct / catalogue_size,
    }


def load_rankers(inputs: Inputs, beams: int) -> dict[str, Ranker]:
    """All methods by name, ours first; counting baselines choose what to count on validation."""
    import json
    from pathlib import Path

    import torch

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
        "cuda" if torch.cuda.is_available() else "cpu",
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


def _alarms(distinct: int, catalogue_size: int, users: int, overlap: float | None) -> list[str]:
    """What looks like a collapse; lists of few users or of few items look like it without one.

    Args:
        distinct: different items among the first ``HEADLINE`` of all lists.
        overlap: share of a list that stays with another user's history, None if not measured.
    """
    alarms = []
    possible = min(catalogue_size, HEADLINE * users)
    if distinct < min(max(2 * HEADLINE, COLLAPSE_SHARE * possible), possible / 2):
        alarms.append(
            f"only {distinct} distinct items are recommended to all users: the model may ignore "
            "its input"
        )
    if overlap is not None and overlap > 0.9:
        alarms.append(
            f"with another user's history {100 * overlap:.0f} % of the recommendations stay: the "
            "model hardly reads it"
        )
    return alarms
