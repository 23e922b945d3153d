"""Claims about the served recommender: what a request may say, and what it is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from registration_world import (
    BEAMS,
    ITEMS,
    Model,
    exhaustive_lists,
    first_catalogue,
    later_catalogue,
    model_files,
    requests,
)
from stage_harness import Bench

from components.evaluation.registration.champion import ranks_in
from components.evaluation.registration.serving import (
    OF_REQUEST,
    OPTIONAL,
    ServedRecommender,
    requests_table,
)
from components.pipeline.errors import DataContractError, ParamsError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    bench = Bench(tmp_path_factory.mktemp("served"))
    Model(first_catalogue(), seed=1).fill(bench)
    return model_files(bench)


@pytest.fixture(scope="module")
def served(files: dict[str, Path]) -> ServedRecommender:
    return ServedRecommender.from_files(files)


def ask(served: ServedRecommender, rows: list[dict[str, Any]], **options: int) -> list[list[int]]:
    answers = served.recommend(requests_table(pd.DataFrame(rows)), **options)
    return list(answers["item_ids"].to_pylist())


@pytest.mark.parametrize("catalogue", [first_catalogue(), later_catalogue()])
def test_lists_are_those_of_exhaustive_scoring_without_unknown_items(
    files: dict[str, Path], served: ServedRecommender, catalogue: np.ndarray
) -> None:
    """Of a later catalogue a third of the items is unknown; one user has no history at all."""
    asked = requests(catalogue)
    lists = ask(served, asked, top_n=ITEMS, beams=BEAMS)
    examples = [row | {"target_timestamp_ms": row["request_timestamp_ms"]} for row in asked]
    assert lists == exhaustive_lists(files, first_catalogue(), examples)
    assert all(sorted(items) == first_catalogue().tolist() for items in lists)


def test_every_signal_of_a_request_is_read(served: ServedRecommender) -> None:
    row = {
        "item_ids": [1000, 1030, 1060],
        "timestamp_ms": [10**12, 10**12 + 10**6, 10**12 + 10**8],
        "feedback": [1, 0, 6],
        "positive": [True, False, True],
        "watch_time_s": [1.0, 30.0, 5.0],
        "duration_s": [10.0, 20.0, 80.0],
        "request_timestamp_ms": 10**12 + 10**10,
    }

    def scores(request: dict[str, Any]) -> list[float]:
        answer = served.recommend(requests_table(pd.DataFrame([request])), beams=BEAMS)
        return list(answer["scores"].to_pylist()[0])

    whole = scores(row)
    for name in [*OPTIONAL, "request_timestamp_ms"]:
        assert scores({k: v for k, v in row.items() if k != name}) != whole, name


def test_a_missing_list_and_a_missing_column_and_unknown_values_are_the_same(
    served: ServedRecommender,
) -> None:
    ids = [[1000, 1003], [1006], []]
    bare = ask(served, [{"item_ids": items} for items in ids])
    nothing = dict.fromkeys([*OPTIONAL, "request_timestamp_ms"])
    assert ask(served, [{"item_ids": items} | nothing for items in ids]) == bare
    unknown = [
        {"item_ids": items} | {name: [value] * len(items) for name, (_, value) in OPTIONAL.items()}
        for items in ids
    ]
    assert ask(served, unknown) == bare


def test_an_event_without_a_time_is_as_old_as_the_one_beside_it(served: ServedRecommender) -> None:
    now = 1_650_000_000_000
    some = [[None, now, None, None, now + 10**8], [None, None, now], [None, None], []]
    all_ = [[now, now, now, now, now + 10**8], [now, now, now], [None, None], []]
    rows = [
        {"item_ids": [1000 + 3 * n for n in range(len(row))], "timestamp_ms": row} for row in some
    ]
    told = [row | {"timestamp_ms": times} for row, times in zip(rows, all_, strict=True)]
    found, wanted = (
        served.recommend(requests_table(pd.DataFrame(asked)), beams=BEAMS)["scores"].to_pylist()
        for asked in (rows, told)
    )
    assert found == wanted


def test_the_time_of_a_request_says_nothing_without_the_times_of_its_events(
    served: ServedRecommender,
) -> None:
    bare = ask(served, [{"item_ids": [1000, 1003]}])
    assert ask(served, [{"item_ids": [1000, 1003], "request_timestamp_ms": 10**12}]) == bare


def test_a_user_is_known_by_id_or_by_what_the_request_tells(served: ServedRecommender) -> None:
    """User 27 (= 2 · 11 + 5) has a row: age 27 mod 3, town 27 mod 4."""

    def scores(**told: Any) -> list[float]:
        request = {"item_ids": [1000, 1030], **told}
        answer = served.recommend(requests_table(pd.DataFrame([request])), beams=BEAMS)
        return list(answer["scores"].to_pylist()[0])

    row = {"age": "0", "town": "town 3"}
    known = scores(user_id=27)
    assert scores(user_id=27, user_features=row) == known
    assert scores(user_id=27, user_features={"age": 0, "town": "town 3", "moon": "new"}) == known
    others = [
        scores(),
        scores(user_features=row),  # the id is a feature of its own
        scores(user_id=27, user_features={"age": "1", "town": "town 3"}),
        scores(user_id=27, user_features={"town": "town 3"}),
        scores(user_id=27 + 11),  # without a row
    ]
    assert len({tuple(answer) for answer in [known, *others]}) == 6
    nothing = scores()
    assert scores(user_id=None) == scores(user_features={"age": "9", "town": None}) == nothing
    assert scores(user_features=None) == scores(user_features={}) == nothing


def test_requests_with_and_without_features_do_not_mix(served: ServedRecommender) -> None:
    asked = [
        {"item_ids": [1000], "user_id": 27},
        {"item_ids": [1000]},
        {"item_ids": [1000], "user_id": 38, "user_features": {"age": "1"}},
    ]
    alone = [ask(served, [row], beams=BEAMS)[0] for row in asked]
    assert ask(served, asked, beams=BEAMS) == alone


def test_arrays_of_numpy_ask_what_lists_ask(served: ServedRecommender) -> None:
    asked = requests(first_catalogue())
    lists = [name for name in asked[0] if name not in OF_REQUEST]
    arrays = [row | {name: np.array(row[name]) for name in lists} for row in asked if row[lists[0]]]
    assert ask(served, arrays) == ask(served, [row for row in asked if row[lists[0]]])


def test_nulls_among_the_items_are_left_out_like_unknown_ones(served: ServedRecommender) -> None:
    signals = {"timestamp_ms": [10**12, 10**12 + 10**6, 10**12 + 10**8], "feedback": [1, 64, 2]}
    unknown = ask(served, [{"item_ids": [1000, 7, 1030]} | signals])
    for nothing in (None, float("nan")):
        assert ask(served, [{"item_ids": [1000, nothing, 1030]} | signals]) == unknown
    assert ask(served, [{"item_ids": [None]}]) == ask(served, [{"item_ids": []}])


def test_an_item_of_id_zero_is_no_null() -> None:
    catalogue = np.array([0, 5])
    table = requests_table(pd.DataFrame({"item_ids": [[None, 5, 0, None]]}))
    examples = ServedRecommender(None, catalogue)._examples(table)  # type: ignore[arg-type]
    assert examples.column("item_index").to_pylist() == [[1, 0]]


def test_a_list_of_another_length_is_refused_with_its_place(served: ServedRecommender) -> None:
    asked = [{"item_ids": [1000], "positive": [True]}, {"item_ids": [1000], "positive": []}]
    with pytest.raises(DataContractError, match=r"request 1 column 'positive': 0 values for 1"):
        ask(served, asked)


@pytest.mark.parametrize("option", ["top_n", "beams"])
def test_less_than_one_item_or_beam_is_refused(served: ServedRecommender, option: str) -> None:
    with pytest.raises(ParamsError, match=f"parameter '{option}': 0 is less than 1"):
        ask(served, [{"item_ids": [1000]}], **{option: 0})


def test_no_request_gets_no_answer(served: ServedRecommender) -> None:
    empty = requests_table(pd.DataFrame({"item_ids": []}))
    assert len(served.recommend(empty)) == 0


def test_ranks_are_places_in_the_lists() -> None:
    lists = [[5, 3, 9], [], [7], [1, 2]]
    targets = np.array([9, 5, 7, 3])
    found = ranks_in(pa.array(lists, pa.list_(pa.int64())), targets)
    assert found.tolist() == [3, 0, 1, 0]
