"""What a rule on the values of a table is, and which rows break it.

Knows no table and no Great Expectations. A :class:`Rule` names an expectation of Great
Expectations and is compiled here to an Arrow mask; :mod:`components.pipeline.data_docs` has the
same rule judged by Great Expectations itself, on the same columns (:func:`rule_view`).
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.pipeline.derived_columns import Derived

#: Largest float32: "finite" as the upper end of a range.
FINITE = 3.4028235e38


@dataclass(frozen=True)
class Parameter:
    """A value in a rule that is known only when the suite runs."""

    name: str


@dataclass(frozen=True)
class Rule:
    """One expectation on one column.

    Attributes:
        name: identifier in quarantine, health and messages.
        column: column of the table or derived column; for a table rule the name of a measure.
        expectation: class of ``great_expectations.expectations``, one of :data:`MASKS`.
        kwargs: its arguments beside ``column``; a :class:`Parameter` is filled in by ``bind``.
        reason: what is wrong with a row (or table) that breaks it, for the user.
        severity: critical: quarantine the row / stop at the table; warning: report only.
        remedy: what the user can do, for table rules.
    """

    name: str
    column: str
    expectation: str
    kwargs: Mapping[str, Any]
    reason: str
    severity: Literal["critical", "warning"] = "critical"
    remedy: str = ""


@dataclass(frozen=True)
class Suite:
    """The rules of one table, as data.

    Attributes:
        table: name of the table.
        row_rules, table_rules: see the module.
        derived: columns that rules need and the table has not, by name.
        spans, means, shares, gaps: columns of which is measured, for table rules, what
            :class:`components.pipeline.measures.Measures` says; those of ``spans`` and ``means``
            may be derived.
    """

    table: str
    row_rules: tuple[Rule, ...]
    table_rules: tuple[Rule, ...]
    derived: Mapping[str, Derived] = field(default_factory=dict)
    spans: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    gaps: tuple[str, ...] = ()

    def bind(self, **values: Any) -> Suite:
        """The suite with its parameters filled in.

        Raises:
            KeyError: a parameter of the suite has no value.
        """

        def filled(rule: Rule) -> Rule:
            kwargs = {
                k: values[v.name] if isinstance(v, Parameter) else v for k, v in rule.kwargs.items()
            }
            return replace(rule, kwargs=kwargs)

        return replace(
            self,
            row_rules=tuple(map(filled, self.row_rules)),
            table_rules=tuple(map(filled, self.table_rules)),
        )


def allowed(rule: Rule) -> str:
    """The values a rule admits, in words."""
    kwargs = rule.kwargs
    if rule.expectation == "ExpectColumnValuesToNotBeNull":
        return "a value"
    if rule.expectation == "ExpectColumnValuesToBeInSet":
        return " or ".join(str(v) for v in kwargs["value_set"])
    parts = []
    if kwargs.get("min_value") is not None:
        word = "above" if kwargs.get("strict_min") else "at least"
        parts.append(f"{word} {kwargs['min_value']}")
    if kwargs.get("max_value") == FINITE:
        parts.append("finite")
    elif kwargs.get("max_value") is not None:
        word = "below" if kwargs.get("strict_max") else "at most"
        parts.append(f"{word} {kwargs['max_value']}")
    return " and ".join(parts)


def python_time(kind: pa.TimestampType) -> tuple[pa.Scalar, pa.Scalar]:
    """The first and the last moment that Python can name, of the years 1 and 9999.

    Args:
        kind: not of nanoseconds, which do not reach them in 64 bits.
    """
    first, last = datetime.datetime.min, datetime.datetime.max.replace(microsecond=0)
    return tuple(pa.scalar(moment.replace(tzinfo=datetime.UTC), kind) for moment in (first, last))


def rule_view(
    suite: Suite, batch: pa.RecordBatch, derived: Mapping[str, pa.Array]
) -> pa.RecordBatch:
    """The columns that row rules name, as both twins judge them.

    NaN becomes +inf: it is a value in Arrow but a missing value in pandas, where Great
    Expectations would pass over it; no finite range admits +inf, and null stays missing.
    A moment outside the years 1 to 9999 becomes the nearest inside: Great Expectations makes
    Python dates of the examples it shows, and there are no others.
    """
    names = dict.fromkeys(rule.column for rule in suite.row_rules)
    columns = {n: derived[n] if n in derived else batch.column(n) for n in names}
    for name, column in columns.items():
        if pa.types.is_floating(column.type):
            columns[name] = pc.if_else(
                pc.is_nan(column), pa.scalar(float("inf"), column.type), column
            )
        elif pa.types.is_timestamp(column.type):
            first, last = python_time(column.type)
            column = pc.if_else(pc.less(column, first), first, column)
            columns[name] = pc.if_else(pc.greater(column, last), last, column)
    return pa.RecordBatch.from_pydict(columns)


def _null(values: pa.Array, kwargs: Mapping[str, Any]) -> pa.Array:
    return values.is_null()


def _outside(values: pa.Array, kwargs: Mapping[str, Any]) -> pa.Array:
    broken = pa.scalar(False)
    for bound, strict, below, below_or_at in (
        ("min_value", "strict_min", pc.less, pc.less_equal),
        ("max_value", "strict_max", pc.greater, pc.greater_equal),
    ):
        if kwargs.get(bound) is not None:
            compare = below_or_at if kwargs.get(strict) else below
            broken = pc.or_(broken, compare(values, pa.scalar(kwargs[bound], values.type)))
    return broken


def _outside_set(values: pa.Array, kwargs: Mapping[str, Any]) -> pa.Array:
    inside = pc.is_in(values, value_set=pa.array(kwargs["value_set"], values.type))
    return pc.and_(values.is_valid(), pc.invert(inside))


#: Expectations that have a mask. Like Great Expectations, all but the first pass over nulls.
MASKS: dict[str, Callable[[pa.Array, Mapping[str, Any]], pa.Array]] = {
    "ExpectColumnValuesToNotBeNull": _null,
    "ExpectColumnValuesToBeBetween": _outside,
    "ExpectColumnValuesToBeInSet": _outside_set,
}


def broken_rows(rule: Rule, values: pa.Array) -> np.ndarray:
    """Which ``values`` (a column of the view) break ``rule``: bool [rows].

    Raises:
        ValueError: the rule's expectation has no mask.
    """
    if rule.expectation not in MASKS:
        raise ValueError(f"rule '{rule.name}': {rule.expectation} is none of {sorted(MASKS)}")
    broken = MASKS[rule.expectation](values, rule.kwargs).fill_null(False)
    return np.asarray(broken.to_numpy(zero_copy_only=False), dtype=bool)
