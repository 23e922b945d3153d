"""Runs the benchmarks by name and shows their figures: a table for people, JSON for scripts.

A benchmark is a module of this folder that defines ``SUMMARY`` (one line) and
``run(quick: bool) -> list[Result]``; a new file joins by itself.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.result import Result
from components.pipeline.errors import ReelflowError, StageError, UsageError
from components.pipeline.machine import cores, cpu_model, gpus, memory_bytes

FOLDER = Path(__file__).resolve().parent


def list_benchmarks() -> dict[str, str]:
    """Summary of each benchmark by name, read from the source: nothing is imported."""
    found: dict[str, str] = {}
    for file in sorted(FOLDER.glob("*.py")):
        for node in ast.parse(file.read_bytes(), str(file)).body:
            if isinstance(node, ast.AnnAssign):
                target: ast.expr = node.target
            elif isinstance(node, ast.Assign):
                target = node.targets[0]
            else:
                continue
            if isinstance(target, ast.Name) and target.id == "SUMMARY" and node.value:
                found[file.stem] = str(ast.literal_eval(node.value))
    return found


def run_benchmark(name: str, *, as_json: bool = False, quick: bool = False) -> None:
    """Run one benchmark and print its figures on standard output.

    Whatever else the benchmark or its child processes print goes to standard error.

    Raises:
        UsageError: there is no such benchmark.
        StageError: it broke.
    """
    known = list_benchmarks()
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise UsageError(
            f"there is no benchmark '{name}'",
            remedy=(f"did you mean '{near[0]}'? " if near else "")
            + f"benchmarks: {', '.join(known)}",
        )
    start = time.perf_counter()
    try:
        with _output_on_stderr():
            results = importlib.import_module(f"benchmarks.{name}").run(quick=quick)
    except ReelflowError:
        raise
    except Exception as error:
        raise StageError(f"benchmark '{name}' failed: {type(error).__name__}: {error}") from error
    document = {
        "bench": name,
        "commit": commit(),
        "machine": machine(),
        "seconds": round(time.perf_counter() - start, 3),
        "results": [_row(result) for result in results],
    }
    if as_json:
        print(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _show(document, results, known[name], quick)


def commit() -> str:
    """The commit that was measured, with ``-dirty`` if files differ from it; or ``unknown``."""
    command = ["git", "-C", str(FOLDER), "describe", "--always", "--abbrev=40", "--dirty"]
    command += ["--exclude", "*"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.strip() or "unknown"


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure."""
    import torch

    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gib": round(memory_bytes() / 1024**3, 1),
        "torch_threads": torch.get_num_threads(),
    }
    devices = gpus()
    return facts | ({"gpus": devices} if devices else {})


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Send standard output, of child processes too, to standard error while the block runs."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _row(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "ours": _finite(result.ours),
        "reference": _finite(result.reference),
        "ratio": _finite(result.ratio),
        "unit": result.unit,
        "low": _finite(result.low),
        "high": _finite(result.high),
        "n": result.n,
    }


def _finite(value: float | None) -> float | None:
    """JSON knows no NaN and no infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def _show(document: dict[str, Any], results: list[Result], summary: str, quick: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=summary, title_justify="left")
    table.add_column("figure", overflow="fold")
    for column in ("ours", "low … high", "reference", "ratio", "n"):
        table.add_column(column, justify="right")
    table.add_column("unit")
    for result, row in zip(results, document["results"], strict=True):
        spread = f"{_number(row['low'])} … {_number(row['high'])}"
        numbers = (_number(row["ours"]), spread, _number(row["reference"]))
        figures = (*numbers, _times(result.ratio), str(row["n"]))
        table.add_row(row["name"], *figures, row["unit"])
    console = Console()
    console.print(table)
    facts = document["machine"]
    console.print(
        f"{document['seconds']:.1f} s on {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['memory_gib']} GiB, {facts['torch_threads']} torch threads"
        + "".join(f", {gpu}" for gpu in facts.get("gpus", []))
        + f"; commit {document['commit']}",
        highlight=False,
    )
    console.print("ratio: how many times better ours is (above 1 wins)")
    if quick:
        console.print("small sizes (--quick): a check that it runs, not a figure")


def _times(ratio: float | None) -> str:
    if ratio is None or math.isnan(ratio):
        return ""
    return "∞" if math.isinf(ratio) else f"{ratio:.2f}×"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
