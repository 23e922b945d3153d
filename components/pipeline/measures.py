"""Measures of a whole table, added up chunk by chunk over the rows that pass, in constant memory.

Knows no table: a :class:`~components.pipeline.rules.Suite` says of which columns what is measured,
and its table rules judge the one row of figures that comes out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.pipeline.rules import Suite

#: What a column looks like on the whole is not said of fewer values.
ENOUGH = 100
#: Distinct values from which on one of them can be said to dominate.
SEVERAL = 20
#: Days from which on a gap in time is one.
LONG_DAYS = 30
#: Values of which the frequency is followed.
KEPT = 1000

DAY_MS = 86_400_000
#: Days of the years 1970 to 2150; rows that pass lie within.
_DAYS = 65_536


class Measures:
    """Measures of a table by name.

    ``rows``, ``rows_passed``, ``quarantined_share`` and ``share_of_<row rule>``, and of the rows
    that pass, as the suite asks (null where there is too little to measure):

    * ``span_of_<column>``: largest minus smallest value; ``spread_of_<column>``: the same of many
      rows;
    * ``mean_of_<column>``; ``typical_<column>``: the same of many values;
    * ``missing_share_of_<column>``: null where all are missing, the source has no such column;
    * ``largest_share_of_<column>``: the share of the most frequent value;
    * ``gap_share_of_<column>``: the longest stretch of days without a row, as a share of all days
      from the first to the last.
    """

    def __init__(self, suite: Suite) -> None:
        self.rows = self.passed = 0
        self._suite = suite
        self._low: dict[str, float] = {}
        self._high: dict[str, float] = {}
        self._sum = dict.fromkeys(suite.means, 0.0)
        self._count = dict.fromkeys(suite.means, 0)
        self._frequent = {name: _Frequent() for name in suite.shares}
        self._days = {name: np.zeros(_DAYS, bool) for name in suite.gaps}

    def add(self, rows: int, good: pa.RecordBatch, view: pa.RecordBatch) -> None:
        """Add a chunk.

        Args:
            rows: how many rows it had.
            good: those of its rows that pass.
            view: their derived columns.
        """
        self.rows += rows
        self.passed += good.num_rows
        for name in self._suite.spans:
            column = view.column(name) if name in self._suite.derived else good.column(name)
            column = column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column
            ends = pc.min_max(column).as_py()
            if ends["min"] is not None:
                self._low[name] = min(self._low.get(name, ends["min"]), ends["min"])
                self._high[name] = max(self._high.get(name, ends["max"]), ends["max"])
        for name in self._suite.means:
            column = view.column(name) if name in self._suite.derived else good.column(name)
            self._sum[name] += float(pc.sum(column).as_py() or 0)
            self._count[name] += len(column) - column.null_count
        for name, frequent in self._frequent.items():
            frequent.add(good.column(name))
        for name, held in self._days.items():
            day = good.column(name).drop_null().cast(pa.int64()).to_numpy() // DAY_MS
            held[np.clip(day, 0, _DAYS - 1)] = True

    def record(self, broken: Mapping[str, int]) -> pa.RecordBatch:
        """One row of float64 measures.

        Args:
            broken: rows that break each row rule, by rule name.
        """
        values: dict[str, float | None] = {
            "rows": self.rows,
            "rows_passed": self.passed,
            "quarantined_share": (self.rows - self.passed) / max(self.rows, 1),
        }
        for rule, count in broken.items():
            values[f"share_of_{rule}"] = count / max(self.rows, 1)
        for name in self._suite.spans:
            known = name in self._low
            span = self._high[name] - self._low[name] if known else None
            values[f"span_of_{name}"] = span
            values[f"spread_of_{name}"] = span if self.passed >= ENOUGH else None
        for name in self._suite.means:
            count = self._count[name]
            values[f"mean_of_{name}"] = self._sum[name] / count if count else None
            enough = count and self.passed >= ENOUGH
            values[f"missing_share_of_{name}"] = 1 - count / self.passed if enough else None
            values[f"typical_{name}"] = self._sum[name] / count if count >= ENOUGH else None
        for name, frequent in self._frequent.items():
            values[f"largest_share_of_{name}"] = frequent.largest_share()
        for name, held in self._days.items():
            values[f"gap_share_of_{name}"] = self._gap_share(held)
        return pa.RecordBatch.from_pydict(
            {
                # Arrow takes no integer beyond 2**53 for a float; a span of hashed ids is one.
                name: pa.array([None if value is None else float(value)], pa.float64())
                for name, value in values.items()
            }
        )

    def _gap_share(self, held: np.ndarray) -> float | None:
        days = np.flatnonzero(held)
        if self.passed < ENOUGH or days[-1] - days[0] < LONG_DAYS:
            return None
        return float((np.diff(days).max() - 1) / (days[-1] - days[0]))


class _Frequent:
    """The most frequent value of a column (Misra and Gries, 1982).

    Counts are kept of ``KEPT`` values; with more, all counts fall by that of the first value that
    has no place. A count is thus too small by at most ``rows / KEPT`` (Agarwal et al., Mergeable
    Summaries, PODS 2012).
    """

    def __init__(self) -> None:
        self._rows = 0
        self._values = np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)

    def add(self, column: pa.Array) -> None:
        counted = pc.value_counts(column.drop_null())
        self._rows += len(column)
        # The chunk is cut first: few values are then sorted.
        values, counts = _most(*(counted.field(n).to_numpy() for n in ("values", "counts")))
        self._values, where = np.unique(np.concatenate([self._values, values]), return_inverse=True)
        summed = np.bincount(where, np.concatenate([self._counts, counts]), len(self._values))
        self._values, self._counts = _most(self._values, summed.astype(np.int64))

    def largest_share(self) -> float | None:
        # With more than ``KEPT`` values, all but the frequent ones may have lost their places.
        few = len(self._values) < SEVERAL and self._counts.sum() == self._rows
        if self._rows < ENOUGH or few:
            return None
        return float(self._counts.max(initial=0) / self._rows)


def _most(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ``KEPT`` most frequent values, their counts less that of the next one."""
    if len(values) <= KEPT:
        return values, counts
    next_one = np.partition(counts, -KEPT - 1)[-KEPT - 1]
    kept = counts > next_one
    return values[kept], counts[kept] - next_one
