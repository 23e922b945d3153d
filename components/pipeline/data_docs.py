"""Great Expectations as the judge of a validation, and its Data Docs as a folder.

Each suite of :mod:`components.pipeline.rules` becomes a Great Expectations suite. Chunks of a
table are validated one after the other, whatever the size of the table; their results are added
up to one result a table, which Great Expectations' own ``UpdateDataDocsAction`` renders. The
pages are then made self-contained (:mod:`components.pipeline.data_docs_pages`).

Importing Great Expectations takes seconds; it is imported by the first :class:`DataDocs`.
"""

from __future__ import annotations

import collections
import datetime
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from components.pipeline.data_docs_pages import make_self_contained
from components.pipeline.rules import Rule, Suite

#: Cells shown for a broken rule, with their row numbers.
SHOWN = 20
_SITE = "data_docs"

_COUNTS = ("element_count", "missing_count", "unexpected_count")
_LISTS = ("partial_unexpected_list", "partial_unexpected_index_list")


def great_expectations() -> Any:
    """The module, imported without telemetry."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx

    return gx


class DataDocs:
    """The validation results of several tables and the html site that shows them.

    Args:
        folder: where the site is written.
        run_time: moment that the pages show as the time of validation.
    """

    def __init__(self, folder: Path, run_time: datetime.datetime) -> None:
        gx = great_expectations()
        self._folder = folder
        self._run_time = run_time
        self.version = str(gx.__version__)
        self._judges: list[GreatExpectationsJudge] = []
        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        # The default site of an ephemeral context lies in a temporary folder of its own.
        for name in list(self._context.get_site_names()):
            self._context.delete_data_docs_site(name)
        self._context.add_data_docs_site(
            _SITE,
            {
                "class_name": "SiteBuilder",
                "show_how_to_buttons": False,
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
                "store_backend": {
                    "class_name": "TupleFilesystemStoreBackend",
                    "base_directory": str(folder.resolve()),
                },
            },
        )
        self._source = self._context.data_sources.add_pandas("arrow")

    def judge(self, suite: Suite) -> GreatExpectationsJudge:
        """The judge of one table; its results will be on the site."""
        judge = GreatExpectationsJudge(self._context, self._source, suite)
        self._judges.append(judge)
        return judge

    def write(self) -> None:
        """Write the pages of everything judged so far: rules and results of each table."""
        from great_expectations.checkpoint import Checkpoint, UpdateDataDocsAction
        from great_expectations.checkpoint.checkpoint import CheckpointResult
        from great_expectations.core.run_identifier import RunIdentifier
        from great_expectations.data_context.types.resource_identifiers import (
            ExpectationSuiteIdentifier,
            ValidationResultIdentifier,
        )

        class InUtc(RunIdentifier):
            """Great Expectations writes the moment in the zone of the machine, and calls it UTC."""

            def set_run_time_tz(self, tz: datetime.timezone | None) -> None: ...

        run_id = InUtc(run_name="validate", run_time=self._run_time)
        results = {}
        for judge in self._judges:
            key = ValidationResultIdentifier(
                ExpectationSuiteIdentifier(name=judge.table), run_id, judge.table
            )
            results[key] = judge.result(run_id)
            self._context.validation_results_store.store_validation_results(
                suite_validation_result=results[key],
                suite_validation_result_identifier=key,
                expectation_suite_identifier=ExpectationSuiteIdentifier(name=judge.table),
            )
        action = UpdateDataDocsAction(name="data_docs", site_names=[_SITE])
        checkpoint = Checkpoint(
            name="validate",
            validation_definitions=[judge.definition for judge in self._judges],
            actions=[action],
        )
        action.run(
            CheckpointResult(run_id=run_id, run_results=results, checkpoint_config=checkpoint)
        )
        make_self_contained(self._folder)


class GreatExpectationsJudge:
    """Judges chunks of one table and adds up the results; see ``validation.Judge``."""

    def __init__(self, context: Any, source: Any, suite: Suite) -> None:
        gx = great_expectations()
        self.table = suite.table
        self._batches = source.add_dataframe_asset(
            suite.table
        ).add_batch_definition_whole_dataframe("chunk")
        self._row_suite = gx.ExpectationSuite(
            f"{suite.table} rows", expectations=[expectation(r) for r in suite.row_rules]
        )
        self._table_suite = gx.ExpectationSuite(
            f"{suite.table} measures", expectations=[expectation(r) for r in suite.table_rules]
        )
        rules = (*suite.row_rules, *suite.table_rules)
        shown = context.suites.add(
            gx.ExpectationSuite(suite.table, expectations=[expectation(r) for r in rules])
        )
        self.definition = context.validation_definitions.add(
            gx.ValidationDefinition(name=suite.table, data=self._batches, suite=shown)
        )
        self._merged: dict[str, _Merged] = {}

    def judge_rows(self, view: pa.RecordBatch, first_row: int) -> dict[str, int]:
        """Number of rows of ``view`` that break each row rule, by rule name."""
        import pandas as pd

        frame = view.to_pandas()
        # Examples on the pages then bear row numbers of the table, not of the chunk.
        frame.index = pd.RangeIndex(first_row, first_row + len(frame))
        return self._judge(self._row_suite, frame)

    def judge_table(self, measures: pa.RecordBatch) -> dict[str, int]:
        """1 for each table rule that ``measures`` (one row) break, else 0, by rule name."""
        return self._judge(self._table_suite, measures.to_pandas())

    def _judge(self, suite: Any, frame: Any) -> dict[str, int]:
        batch = self._batches.get_batch(batch_parameters={"dataframe": frame})
        outcome = batch.validate(suite, result_format={"result_format": "SUMMARY"})
        counts = {}
        for result in outcome.results:
            name = result.expectation_config.meta["rule"]
            if result.exception_info.get("raised_exception", True):
                raise RuntimeError(
                    f"Great Expectations cannot judge '{self.table}.{name}': "
                    f"{result.exception_info}"
                )
            self._merged.setdefault(name, _Merged(result.expectation_config)).add(result.result)
            counts[name] = int(result.result["unexpected_count"])
        return counts

    def result(self, run_id: Any) -> Any:
        """All chunks as one Great Expectations result of the table."""
        from great_expectations.core.expectation_validation_result import (
            ExpectationSuiteValidationResult,
        )

        results = [merged.result() for merged in self._merged.values()]
        good = sum(r.success for r in results)
        return ExpectationSuiteValidationResult(
            success=good == len(results),
            results=results,
            suite_name=self.table,
            statistics={
                "evaluated_expectations": len(results),
                "successful_expectations": good,
                "unsuccessful_expectations": len(results) - good,
                "success_percent": 100 * good / len(results) if results else None,
            },
            meta={
                "run_id": run_id,
                "validation_time": run_id.run_time.isoformat(),
                "great_expectations_version": great_expectations().__version__,
                "active_batch_definition": {
                    "datasource_name": "arrow",
                    "data_connector_name": "fluent",
                    "data_asset_name": self.table,
                    "batch_identifiers": {},
                },
            },
        )


class _Merged:
    """Results of one expectation over the chunks of a table."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._lists: dict[str, list[Any]] = {name: [] for name in _LISTS}
        self._values: collections.Counter[Any] = collections.Counter()

    def add(self, result: Mapping[str, Any]) -> None:
        for name in _COUNTS:
            self._counts[name] += int(result.get(name) or 0)
        for name, kept in self._lists.items():
            kept += list(result.get(name) or [])[: SHOWN - len(kept)]
        for entry in result.get("partial_unexpected_counts") or []:
            if isinstance(entry, dict) and "value" in entry:
                self._values[entry["value"]] += int(entry["count"])

    def result(self) -> Any:
        from great_expectations.core.expectation_validation_result import (
            ExpectationValidationResult,
        )

        rows = self._counts["element_count"]
        unexpected = self._counts["unexpected_count"]
        present = rows - self._counts["missing_count"]
        if self._config.type == "expect_column_values_to_not_be_null":
            present = rows
        total = 100 * unexpected / rows if rows else 0.0
        nonmissing = 100 * unexpected / present if present else 0.0
        return ExpectationValidationResult(
            success=unexpected == 0,
            expectation_config=self._config,
            result={
                **self._counts,
                "missing_percent": 100 * self._counts["missing_count"] / rows if rows else 0.0,
                "unexpected_percent": nonmissing,
                "unexpected_percent_total": total,
                "unexpected_percent_nonmissing": nonmissing,
                **self._lists,
                "partial_unexpected_counts": [
                    {"value": v, "count": c} for v, c in self._values.most_common(SHOWN)
                ],
            },
        )


def expectation(rule: Rule) -> Any:
    """The Great Expectations expectation of a bound rule."""
    great_expectations()
    from great_expectations import expectations

    kind = getattr(expectations, rule.expectation)
    return kind(
        column=rule.column,
        **rule.kwargs,
        severity=rule.severity,
        notes=rule.reason,
        meta={"rule": rule.name},
    )
