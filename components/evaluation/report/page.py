"""The report page: how its content becomes one HTML string.

Pure: no files are read but the template beside this module, no clock, no network. The page holds
its own style, script and charts, forbids everything else by its content security policy, and says
all it has to say without the script. Text of a data set passes through `formats.clip` and through
escaping: it is never markup.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from components.evaluation.report import charts, formats
from components.evaluation.report.content import (
    HEADLINE_METRIC,
    Curve,
    Estimate,
    Method,
    Page,
)

TEMPLATES = Path(__file__).resolve().parent
TITLE_LENGTH = 140
TAGS_LENGTH = 80


def render(page: Page) -> str:
    """The page as one self-contained HTML document."""
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    evaluation = page.evaluation
    ranked = sorted(
        evaluation.methods,
        key=lambda m: m.metrics[HEADLINE_METRIC].value,
        reverse=True,
    )
    differences = [d for d in evaluation.differences if d.metric == HEADLINE_METRIC]
    parents = {stage.name: set(stage.parents) for stage in page.stages}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            page=page,
            style=_raw(TEMPLATES / "page.css"),
            script=_raw(TEMPLATES / "page.js"),
            script_digest=digest,
            headline_metric=HEADLINE_METRIC,
            ranked=ranked,
            best={which: _best(ranked, which) for which in ("metrics", "masked")},
            ours=next((m for m in ranked if m.name == evaluation.ours), None),
            metric_names=list(dict.fromkeys(n for m in ranked for n in m.metrics)),
            differences=differences,
            other_differences=[d for d in evaluation.differences if d.metric != HEADLINE_METRIC],
            forest=_forest([m.metrics[HEADLINE_METRIC] for m in ranked]),
            difference_forest=_forest([d.estimate for d in differences]),
            lines=[_line(c) for c in page.curves],
            aligned=[_line(c) for c in page.alignment.curves],
            usage=[charts.usage_area(level.counts) for level in page.semantic_ids.levels],
            graph=charts.stage_graph(parents | {"report": set(page.report_parents)}),
            seconds=sum(s.seconds for s in page.stages),
            longest=max((s.seconds for s in page.stages), default=0.0),
            peak=max((s.peak_rss_bytes or 0 for s in page.stages), default=0),
            title_length=TITLE_LENGTH,
            tags_length=TAGS_LENGTH,
        )
    )


def _best(methods: Sequence[Method], which: str) -> dict[str, float]:
    """Highest value of each metric over all methods."""
    best: dict[str, float] = {}
    for method in methods:
        for name, estimate in getattr(method, which).items():
            best[name] = max(best.get(name, estimate.value), estimate.value)
    return best


def _forest(estimates: Sequence[Estimate]) -> charts.Forest | None:
    if not estimates:
        return None
    return charts.forest([(e.value, e.low, e.high) for e in estimates])


def _line(curve: Curve) -> charts.LineChart:
    return charts.line_chart(
        curve.name,
        list(curve.steps),
        list(curve.values),
        show=formats.compact,
        marked=curve.marked,
        floor=curve.floor,
    )


@functools.cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    words: list[Callable[..., str]]
    words = [formats.clip, formats.compact, formats.count, formats.duration, formats.label]
    words += [formats.metric_label, formats.moment, formats.score, formats.share]
    words += [formats.signed, formats.size]
    environment.filters |= {word.__name__: word for word in words}
    return environment


def _raw(file: Path) -> Any:
    from markupsafe import Markup

    return Markup(file.read_text(encoding="utf-8"))
