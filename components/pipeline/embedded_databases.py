"""The SQLite files of Prefect and MLflow under ``home``: readable, whole, of a version known here.

Looked at without the programs they belong to, which take seconds to import, and without a change.
"""

from __future__ import annotations

import importlib.util
import re
import sqlite3
from contextlib import closing
from pathlib import Path

from components.pipeline.finding import Finding
from components.pipeline.settings import Settings

#: Where each program keeps the steps that lead to its newest tables.
MIGRATIONS = {
    "prefect": "server/database/_migrations/versions/sqlite",
    "mlflow": "store/db_migrations/versions",
}
KEEPS = {
    "prefect": "the history of runs, no results",
    "mlflow": "tracked runs and the model registry",
}


def databases(settings: Settings) -> list[Finding]:
    """One finding for each embedded database that is there."""
    files = {}
    if settings.prefect_api is None:
        files["prefect"] = settings.home / "prefect" / "prefect.db"
    if settings.tracking_database is not None:
        files["mlflow"] = settings.tracking_database
    return [_database(program, file) for program, file in files.items() if file.exists()]


def _database(program: str, file: Path) -> Finding:
    subject = f"{program} tables"
    moved = f"move {file} away ({KEEPS[program]}); the next run makes a new one"
    try:
        # What is in the write-ahead log counts, if there is one; else nothing beside is touched.
        mode = "mode=ro" if file.with_name(f"{file.name}-wal").exists() else "immutable=1"
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?{mode}", uri=True)) as database:
            found = [row[0] for row in database.execute("SELECT * FROM alembic_version")]
            said = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        if "no such table" in str(error):
            said = "its tables are not complete: making them was cut short"
            return Finding(subject, f"{file}: {said}", moved, broken=True)
        remedy = f"check the rights; if it is damaged, {moved}"
        return Finding(subject, f"{file}: {error}", remedy, broken=True)
    if said != "ok":
        return Finding(subject, f"{file}: damaged: {said}", moved, broken=True)
    known = _revisions(program)
    if unknown := [revision for revision in found if revision not in known]:
        text = f"{file}: made by a newer {program} (revision {', '.join(unknown)})"
        return Finding(subject, text, f"make setup, or {moved}", broken=True)
    return Finding(subject, f"{file}: whole, revision {', '.join(found)}")


def _revisions(program: str) -> set[str]:
    spec = importlib.util.find_spec(program)
    if spec is None or spec.origin is None:
        return set()
    files = (Path(spec.origin).parent / MIGRATIONS[program]).glob("*.py")
    texts = (re.search(r"""^revision\b.*?=\s*["'](\w+)["']""", f.read_text(), re.M) for f in files)
    return {match[1] for match in texts if match}
