"""Streams a table past its rules: which rows go on, which to quarantine, and whether to go on.

Knows no table. The masks of :mod:`components.pipeline.rules` decide row by row; a *judge* (Great
Expectations, :mod:`components.pipeline.data_docs`) judges the same rules on the same columns, and
where both run they must count the same broken rows, chunk by chunk, or validation stops: Great
Expectations is the judge, the mask its fast twin that can also say which rows to set aside.

Two kinds of rules: *row rules* send each row that breaks them to quarantine; *table rules* are
put to one row of measures of the whole table (``rows``, ``quarantined_share``, …) and, broken,
stop the flow. A rule of severity ``warning`` does neither: it is reported.

A table is read in chunks, never held: memory is bounded by the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from components.pipeline.derived_columns import Surroundings
from components.pipeline.errors import DataContractError, StageError
from components.pipeline.measures import Measures
from components.pipeline.quarantine import quarantine_lines, records
from components.pipeline.rules import Rule, Suite, allowed, broken_rows, rule_view

#: Rows judged at a time; also rows of a written row group.
CHUNK_ROWS = 256 * 1024
EXAMPLES = 5
#: Characters of an example; a text may be of any length.
SHOWN = 2000


class Source(Protocol):
    """A table that can be read more than once."""

    @property
    def schema(self) -> pa.Schema: ...

    def batches(
        self, columns: list[str] | None = None, batch_size: int = 65536
    ) -> Iterator[pa.RecordBatch]: ...


class Judge(Protocol):
    """Who judges the rules beside the masks."""

    def judge_rows(self, view: pa.RecordBatch, first_row: int) -> dict[str, int]:
        """Number of rows that break each row rule, by rule name."""

    def judge_table(self, measures: pa.RecordBatch) -> dict[str, int]:
        """1 for each table rule that is broken, else 0, by rule name."""


@dataclass
class Verdict:
    """What became of one rule.

    Attributes:
        level: ``row`` or ``table``.
        broken: rows that break it; for a table rule 1 or 0.
        of: rows judged; for a table rule 1.
        observed: the measure a table rule saw.
        examples: ``{"row", "record"}`` of the first rows that break it.
    """

    rule: Rule
    level: Literal["row", "table"]
    broken: int = 0
    of: int = 0
    observed: float | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule.name,
            "level": self.level,
            "severity": self.rule.severity,
            "column": self.rule.column,
            "reason": self.rule.reason,
            "allowed": allowed(self.rule),
            "broken": self.broken,
            "of": self.of,
            "observed": self.observed,
            "examples": self.examples,
        }


@dataclass
class TableReport:
    """What validation found in one table."""

    table: str
    rows: int
    quarantined: int
    verdicts: list[Verdict]

    @property
    def passed(self) -> int:
        return self.rows - self.quarantined

    @property
    def stopping(self) -> list[Verdict]:
        """Broken table rules that must stop the flow."""
        return [
            v
            for v in self.verdicts
            if v.level == "table" and v.broken and v.rule.severity == "critical"
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows_in": self.rows,
            "rows_passed": self.passed,
            "rows_quarantined": self.quarantined,
            "rules": [v.to_json() for v in self.verdicts],
        }


def validate_table(
    suite: Suite,
    source: Source,
    passed: Callable[[pa.RecordBatch], object],
    quarantined: Callable[[pa.RecordBatch], object],
    *,
    scratch: Path,
    judge: Judge | None = None,
    references: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int], object] = lambda rows: None,
) -> TableReport:
    """Judge every row of a table, hand each on to one of two places, then judge the table.

    Args:
        suite: bound rules of the table.
        source: the table; read once, and once more for each derived column that needs it.
        passed: called with batches (schema of :func:`passed_schema`) of rows that may go on.
        quarantined: called with batches (schema :data:`QUARANTINE`), one line a broken row: its
            number in ``source`` from 0, the first critical rule it breaks, the reasons of all of
            them, and the row as JSON.
        scratch: folder for temporary files.
        judge: Great Expectations, or None for the masks alone.
        references: sorted identifiers of other tables, by table name.
        progress: called with a number of rows just finished.

    Raises:
        DataContractError: a column that a rule needs is missing.
        StageError: judge and mask disagree about a rule.
    """
    _check_columns(suite, source.schema)
    schema = passed_schema(suite, source.schema)
    around = Surroundings(source.batches, scratch, references or {})
    derive = {name: how.bind(around) for name, how in suite.derived.items()}
    verdicts = [Verdict(rule, "row") for rule in suite.row_rules]
    measures = Measures(suite)
    for chunk in chunks(source.batches(batch_size=CHUNK_ROWS), CHUNK_ROWS):
        first_row = measures.rows
        view = rule_view(suite, chunk, {name: of(chunk, first_row) for name, of in derive.items()})
        masks = [broken_rows(rule, view.column(rule.column)) for rule in suite.row_rules]
        counts = {v.rule.name: int(mask.sum()) for v, mask in zip(verdicts, masks)}
        if judge is not None:
            _agree(suite.table, judge.judge_rows(view, first_row), counts)
        good, good_view = chunk, view
        sent_off = _union(
            [m for v, m in zip(verdicts, masks) if v.rule.severity == "critical"], len(chunk)
        )
        if sent_off.any():
            quarantined(quarantine_lines(suite, chunk, masks, sent_off, first_row))
            good, good_view = (rows.filter(pa.array(~sent_off)) for rows in (chunk, view))
        if good.num_rows:
            passed(pa.RecordBatch.from_arrays(good.columns, schema=schema))
        for verdict, mask in zip(verdicts, masks):
            verdict.broken += counts[verdict.rule.name]
            verdict.of += len(chunk)
            _keep_examples(verdict, chunk, mask, first_row)
        measures.add(chunk.num_rows, good, good_view)
        progress(chunk.num_rows)
    broken = {verdict.rule.name: verdict.broken for verdict in verdicts}
    verdicts += _judge_table(suite, measures.record(broken), judge)
    return TableReport(suite.table, measures.rows, measures.rows - measures.passed, verdicts)


def require(report: TableReport, *, rejected: Path | None = None) -> None:
    """Stop if the table breaks a critical table rule.

    Args:
        rejected: where the quarantined rows were kept, for the message.

    Raises:
        DataContractError: names table, rules, observed and allowed values, the first broken rows
            and what to do.
    """
    if not report.stopping:
        return
    lines = []
    for verdict in report.stopping:
        rule = verdict.rule
        observed = "nothing" if verdict.observed is None else f"{verdict.observed:.6g}"
        lines.append(
            f"rule '{rule.name}' is broken: {rule.reason}; {rule.column} is {observed}, "
            f"allowed is {allowed(rule)}"
        )
    lines.append(
        f"{report.rows:,} rows came in, {report.passed:,} passed, "
        f"{report.quarantined:,} would be quarantined"
    )
    for verdict in report.verdicts:
        if verdict.level == "row" and verdict.broken:
            lines.append(
                f"broken by rows: '{verdict.rule.name}' {verdict.broken:,} times "
                f"({verdict.rule.reason}), first"
            )
            lines += [f"  row {e['row']}: {e['record']}" for e in verdict.examples[:3]]
    remedies = list(dict.fromkeys(v.rule.remedy for v in report.stopping if v.rule.remedy))
    if rejected is not None and report.quarantined:
        remedies.append(f"every broken row, with its reason, is in {rejected}")
    raise DataContractError(
        "\n  ".join(lines), where=f"table '{report.table}'", remedy="; ".join(remedies) or None
    )


def passed_schema(suite: Suite, schema: pa.Schema) -> pa.Schema:
    """Schema of the rows that pass: a column that a critical rule keeps from null is not null."""
    filled = {
        rule.column
        for rule in suite.row_rules
        if rule.expectation == "ExpectColumnValuesToNotBeNull" and rule.severity == "critical"
    }
    return pa.schema([f.with_nullable(f.name not in filled) for f in schema])


def chunks(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of ``rows`` (the last may be shorter).

    Files of many small row groups would otherwise cost a judgement each.
    """
    waiting: list[pa.RecordBatch] = []
    held = 0
    for batch in batches:
        while batch.num_rows:
            taken = batch.slice(0, rows - held)
            batch = batch.slice(taken.num_rows)
            waiting.append(taken)
            held += taken.num_rows
            if held == rows:
                yield pa.concat_batches(waiting)
                waiting, held = [], 0
    if waiting:
        yield pa.concat_batches(waiting)


def _union(masks: Sequence[np.ndarray], rows: int) -> np.ndarray:
    union = np.zeros(rows, bool)
    for mask in masks:
        union |= mask
    return union


def _agree(table: str, judged: Mapping[str, int], counted: Mapping[str, int]) -> None:
    for name, count in counted.items():
        if judged[name] != count:
            raise StageError(
                f"Great Expectations finds rule '{name}' broken {judged[name]} times, its mask "
                f"{count} times",
                where=f"table '{table}'",
                remedy="this is a defect of the program, not of the data: please report it",
            )


def _check_columns(suite: Suite, schema: pa.Schema) -> None:
    needed = {rule.column for rule in suite.row_rules} - set(suite.derived)
    needed |= {column for how in suite.derived.values() for column in how.columns}
    needed |= {*suite.spans, *suite.means, *suite.shares, *suite.gaps} - set(suite.derived)
    missing = sorted(needed - set(schema.names))
    if missing:
        raise DataContractError(
            f"column {', '.join(map(repr, missing))} is missing; the table has "
            + ", ".join(schema.names),
            where=f"table '{suite.table}'",
            remedy="add the column (of nulls where the source has no such value)",
        )


def _keep_examples(
    verdict: Verdict, chunk: pa.RecordBatch, mask: np.ndarray, first_row: int
) -> None:
    room = EXAMPLES - len(verdict.examples)
    if room <= 0 or not mask.any():
        return
    at = np.flatnonzero(mask)[:room]
    texts = records(chunk.take(pa.array(at))).to_pylist()
    verdict.examples += [
        {"row": int(r) + first_row, "record": t if len(t) <= SHOWN else f"{t[:SHOWN]}…"}
        for r, t in zip(at, texts)
    ]


def _judge_table(suite: Suite, measures: pa.RecordBatch, judge: Judge | None) -> list[Verdict]:
    verdicts = []
    for rule in suite.table_rules:
        values = measures.column(rule.column)
        broken = int(broken_rows(rule, values).sum())
        verdicts.append(Verdict(rule, "table", broken, 1, values[0].as_py()))
    if judge is not None:
        counted = {v.rule.name: v.broken for v in verdicts}
        _agree(suite.table, judge.judge_table(measures), counted)
    return verdicts
