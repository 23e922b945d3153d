"""Finds the HTML report of a run in the artifact store."""

from __future__ import annotations

from pathlib import Path

from components.pipeline.artifacts import Input
from components.pipeline.errors import UsageError
from components.pipeline.manifest import Manifest, Store

STAGE = ARTIFACT = "report"
PAGE = "report.html"
LATEST = "latest"
LISTED = 10


def find_report(store: Store, run: str) -> Path:
    """Local path of the report of ``run``, fetched if the store is remote.

    Args:
        run: ``latest``, or the key of a report or the start of one.

    Raises:
        UsageError: no report has that key, or several do; the message lists them.
        CorruptArtifactError: the page was altered after it was published.
    """
    reports = store.manifests(STAGE)
    if not reports:
        raise UsageError(
            "there is no report in this store",
            where=store.uri,
            remedy="make one: reelflow run recommend",
        )
    if run == LATEST:
        return _page(store, reports[0])
    found = [report for report in reports if report.key.startswith(run)]
    if len(found) == 1:
        return _page(store, found[0])
    shown = found or reports
    listed = "".join(f"\n    {r.key}  {r.body['created_at'][:16]}" for r in shown[:LISTED])
    more = f"\n    and {len(shown) - LISTED} older ones" if len(shown) > LISTED else ""
    raise UsageError(
        f"{len(found)} reports begin with '{run}'" if found else f"no report begins with '{run}'",
        where=store.uri,
        remedy=f"give `latest` or more of a key:{listed}{more}",
    )


def _page(store: Store, report: Manifest) -> Path:
    return Path(Input(store, ARTIFACT, report).path(PAGE))
