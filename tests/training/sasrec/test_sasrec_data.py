"""Windows of events: what is predicted, how often, and from what."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from components.training.sasrec.data import (
    Sequences,
    epoch_windows,
    newest_windows,
    read_sequences,
)


def make_table(lengths: list[int], seed: int = 0) -> pa.Table:
    """Event number `e` of user `u` is item 1000 u + e, so that an item names its event."""
    rng = np.random.default_rng(seed)
    items = [[1000 * u + e for e in range(n)] for u, n in enumerate(lengths)]
    flags = [(rng.random(n) < 0.5).tolist() for n in lengths]
    return pa.table(
        {
            "item_index": pa.array(items, pa.list_(pa.int32())),
            "positive": pa.array(flags, pa.list_(pa.bool_())),
        }
    )


def make_sequences(lengths: list[int], newest: int = 10_000) -> Sequences:
    return read_sequences(make_table(lengths).to_batches(max_chunksize=3), newest)


def test_newest_events_of_every_row_are_read() -> None:
    table = make_table([5, 0, 2, 9, 1])
    sequences = read_sequences(table.to_batches(max_chunksize=2), 4)
    rows = zip(table["item_index"].to_pylist(), table["positive"].to_pylist(), strict=True)
    for user, (items, flags) in enumerate(rows):
        part = slice(sequences.start_U[user], sequences.end_U[user])
        assert sequences.items_E[part].tolist() == items[-4:]
        assert sequences.positive_E[part].tolist() == flags[-4:]


def test_no_row_at_all_is_no_sequence() -> None:
    assert len(read_sequences([], 5)) == 0


@pytest.mark.parametrize("length", [1, 3, 8])
def test_every_event_but_the_first_is_predicted_once_an_epoch(length: int) -> None:
    lengths = [0, 1, 2, 3, 4, 8, 9, 10, 25, 40]
    sequences = make_sequences(lengths)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        targets: Counter[int] = Counter()
        for batch in epoch_windows(sequences, length, 4, rng).batches():
            for row, size in zip(batch.items_BL, batch.length_B, strict=True):
                window = row[:size].tolist()
                assert 2 <= len(window) <= length + 1
                assert window == list(range(window[0], window[0] + len(window)))
                targets.update(window[1:])
        expected = {1000 * u + e for u, n in enumerate(lengths) for e in range(1, n)}
        assert targets == Counter(dict.fromkeys(expected, 1))


def test_short_sequences_are_never_cut() -> None:
    sequences = make_sequences([7] * 20)
    for batch in epoch_windows(sequences, 6, 8, np.random.default_rng(0)).batches():
        assert (batch.length_B == 7).all()


def test_long_sequences_are_cut_elsewhere_every_epoch() -> None:
    sequences = make_sequences([100])
    starts = set()
    for seed in range(20):
        for batch in epoch_windows(sequences, 10, 64, np.random.default_rng(seed)).batches():
            starts.update(batch.items_BL[:, 0].tolist())
    assert len(starts) > 40


def test_padding_is_item_zero_and_not_positive() -> None:
    sequences = make_sequences([2, 6])
    batch = newest_windows(sequences, 4, slice(0, 2))
    assert batch.items_BL.tolist() == [[0, 1, 0, 0], [1002, 1003, 1004, 1005]]
    assert batch.length_B.tolist() == [2, 4]
    assert not batch.positive_BL[0, 2:].any()
