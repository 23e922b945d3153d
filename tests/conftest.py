"""Settings of every test: one thread a process, no telemetry, nothing outside the test's folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Before any numerical library is imported: tests run two at a time on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


#: Files that take minutes come first: begun last, one of them would keep one worker busy alone.
LONG_FIRST = ("faults", "flows", "serving", "pipeline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they may take; the order within a file stays."""

    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        return LONG_FIRST.index(folder) if folder in LONG_FIRST else len(LONG_FIRST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; ``REELFLOW_SHARED_DATA`` names another place."""
    folder = Path(os.environ.get("REELFLOW_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data sets at {folder}")
    return folder


@pytest.fixture(autouse=True)
def no_code_of_loaded_models() -> Iterator[None]:
    """MLflow puts the code of a model that it loads on the path, before this code, and leaves it.

    Child processes would then import what the model was registered with.
    """
    yield
    sys.path[:] = [
        path for path in sys.path if Path(path) == ROOT or not (Path(path) / "components").is_dir()
    ]
