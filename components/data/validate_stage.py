"""The `validate` stage: raw tables in, tables that can be trusted and a quarantine out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from components.pipeline.params_base import Params
from components.pipeline.stage import Inputs, Outputs, Run, stage

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from components.pipeline.validation import TableReport

#: A table comes after those it refers to.
TABLES = ("items", "users", "interactions")


class ValidateParams(Params):
    """What validation tolerates and who judges."""

    max_quarantine_share: float = Field(
        0.05, ge=0, le=1, description="a table with a larger share of broken rows stops the flow"
    )
    great_expectations: bool = Field(
        True, description="judge every row by Great Expectations too and write its Data Docs"
    )


@stage(
    inputs=("raw_interactions", "raw_items", "raw_users", "source"),
    outputs=("interactions", "items", "users", "quarantine", "data_docs", "data_health"),
    params=ValidateParams,
)
def validate(
    params: ValidateParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Checks every row against the rules; broken rows go to quarantine with the reason."""
    import datetime

    from components.data.expectations import SUITES, latest_timestamp
    from components.pipeline.data_docs_pages import write_index
    from components.pipeline.quarantine import QUARANTINE
    from components.pipeline.validation import passed_schema, require, validate_table

    # The source says which day it is: the clock would make other artifacts of equal inputs.
    day = inputs["source"].read_json()["newest_day"]
    today = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
    docs = None
    if params.great_expectations:
        from components.pipeline.data_docs import DataDocs

        docs = DataDocs(Path(outputs["data_docs"].path()), today)

    identifiers: dict[str, np.ndarray] = {}
    reports: list[TableReport] = []
    with outputs["quarantine"].writer(QUARANTINE) as quarantine:
        for table in TABLES:
            source = inputs[f"raw_{table}"]
            _check_contract(table, source.schema)
            suite = SUITES[table].bind(
                max_quarantine_share=params.max_quarantine_share, latest=latest_timestamp(today)
            )
            keys = _Keys(f"{table[:-1]}_id" if table != "interactions" else None)
            with (
                outputs[table].writer(passed_schema(suite, source.schema)) as writer,
                _in_background(writer.write_batch) as write,
                run.progress(source.rows or 0, table) as bar,
            ):
                report = validate_table(
                    suite,
                    source,
                    keys.collecting(write),
                    quarantine.write_batch,
                    scratch=run.scratch,
                    judge=docs.judge(suite) if docs else None,
                    references=identifiers,
                    progress=bar.advance,
                )
            identifiers[table] = keys.sorted()
            reports.append(report)
            if report.quarantined:
                run.note(f"{table}: {report.quarantined:,} of {report.rows:,} rows quarantined")
            for verdict in report.verdicts:
                if verdict.broken and verdict.rule.severity == "warning":
                    rows = f"{verdict.broken:,} of {verdict.of:,} rows: "
                    counted = rows if verdict.level == "row" else ""
                    run.note(f"warning: {table}: {counted}{verdict.rule.reason}")
            if report.stopping:
                break

    tables = [{"table": report.table, **report.to_json()} for report in reports]
    judged = "judged by Arrow masks alone"
    if docs is not None:
        docs.write()
        judged = f"judged by Great Expectations {docs.version} and, to the same counts, Arrow masks"
    write_index(Path(outputs["data_docs"].path()), tables, f"Every row was {judged}.")
    outputs["data_health"].write_json(
        {
            "tables": {table.pop("table"): table for table in tables},
            "max_quarantine_share": params.max_quarantine_share,
            "great_expectations": docs.version if docs else None,
            "day": day,
        }
    )
    if reports[-1].stopping:
        require(reports[-1], rejected=_keep_rejected(outputs, run.scratch))
    return {
        "rows_in": sum(report.rows for report in reports),
        "rows_passed": sum(report.passed for report in reports),
        "rows_quarantined": sum(report.quarantined for report in reports),
        "rules_failed": sum(v.broken > 0 for report in reports for v in report.verdicts),
    }


@contextmanager
def _in_background(
    write: Callable[[pa.RecordBatch], object], depth: int = 2
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    """``write`` in a thread, in order, at most ``depth`` batches behind: Arrow compresses one
    chunk while the next is judged. All is written when the block ends."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[object]] = deque()

        def submit(batch: pa.RecordBatch) -> None:
            if len(waiting) == depth:
                waiting.popleft().result()
            waiting.append(pool.submit(write, batch))

        yield submit
        for written in waiting:
            written.result()


class _Keys:
    """Identifiers of the rows that pass, collected on their way to the writer."""

    def __init__(self, column: str | None) -> None:
        self._column = column
        self._parts: list[np.ndarray] = []

    def collecting(
        self, write: Callable[[pa.RecordBatch], object]
    ) -> Callable[[pa.RecordBatch], None]:
        def collect(batch: pa.RecordBatch) -> None:
            if self._column is not None:
                self._parts.append(batch.column(self._column).to_numpy())
            write(batch)

        return collect

    def sorted(self) -> np.ndarray:
        import numpy as np

        return np.sort(np.concatenate(self._parts)) if self._parts else np.empty(0, np.int64)


def _check_contract(table: str, schema: pa.Schema) -> None:
    from components.data.contracts import CONTRACTS
    from components.pipeline.errors import DataContractError

    for field in CONTRACTS[table].schema:
        at = schema.get_field_index(field.name)
        if at < 0 or schema.field(at).type != field.type:
            found = "missing" if at < 0 else f"of type {schema.field(at).type}"
            raise DataContractError(
                f"the column is {found}; the contract says {field.type}",
                where=f"table '{table}' column '{field.name}'",
                remedy="read the data with the ingest stage, which casts to the contract",
            )


def _keep_rejected(outputs: Any, scratch: Path) -> Path:
    """A stopped stage publishes nothing: what its user needs to see stays in the scratch folder."""
    import shutil

    kept = scratch / "rejected"
    shutil.rmtree(kept, ignore_errors=True)
    for name in ("quarantine", "data_docs", "data_health"):
        shutil.copytree(outputs[name].path(), kept / name)
    return kept / "quarantine"
