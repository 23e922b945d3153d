"""The geometry of the report's charts: from numbers to positions in per cent of a plot.

Charts are drawn by the macros of ``charts.html.j2`` in per cent of a box that is as wide as the
screen allows, so that text keeps its size on a phone. This module decides what is drawn where and
knows nothing of HTML.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_VERTICES = 240
MAX_HOVERS = 60


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high``."""

    low: float
    high: float
    ticks: tuple[Tick, ...]

    def percent(self, value: float) -> float:
        """Position of ``value`` along the axis, 0 to 100."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


def axis(low: float, high: float, *, count: int = 5, tight: bool = False) -> Axis:
    """An axis over [low, high] with round ticks (1, 2 or 5 times a power of ten).

    Args:
        low: smallest value drawn.
        high: largest value drawn.
        count: about so many ticks.
        tight: end the axis at ``low`` and ``high`` instead of at the ticks around them.
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not tight:
        low, high = first * step, last * step
    inside = [i * step for i in range(first, last + 1)]
    inside = [v for v in inside if low - step * 1e-6 <= v <= high + step * 1e-6]
    span = high - low
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    words = [f"{v:,.{places}f}".replace("-", "−") if abs(v) > step / 2 else "0" for v in inside]
    ticks = (Tick(round(100 * (v - low) / span, 2), w) for v, w in zip(inside, words, strict=True))
    return Axis(low, high, tuple(ticks))


@dataclass(frozen=True)
class Mark:
    """A point with the words shown over it."""

    x: float
    y: float
    words: str


@dataclass(frozen=True)
class LineChart:
    """One line. ``line`` and ``band`` are SVG points in a box of 100 × 100, y downwards.

    Attributes:
        marked: the point that is pointed out.
        floor: a level, at the left end of the line that is drawn there.
    """

    name: str
    x_name: str
    x: Axis
    y: Axis
    line: str
    band: str
    marks: tuple[Mark, ...]
    marked: Mark | None
    floor: Mark | None
    words: str


def line_chart(
    name: str,
    steps: Sequence[float],
    values: Sequence[float],
    *,
    show: Callable[[float], str],
    x_name: str = "step",
    marked: tuple[float, str] | None = None,
    floor: tuple[float, str] | None = None,
) -> LineChart:
    """A line over steps; more than ``MAX_VERTICES`` points become means with a min–max band.

    Args:
        name: what is drawn, e.g. ``"training loss"``.
        steps: ascending positions.
        values: as many finite values.
        show: words of a value.
        x_name: what the steps count.
        marked: one of the steps, which is pointed out, and the word for it.
        floor: a level, which is drawn as well, and the words for it.

    Raises:
        ValueError: no points, not as many steps as values, or none at the marked step.
    """
    if not steps or len(steps) != len(values):
        raise ValueError(f"{name}: {len(steps)} steps, {len(values)} values")
    size = math.ceil(len(steps) / MAX_VERTICES)
    bins = [slice(i, i + size) for i in range(0, len(steps), size)]
    centres = [sum(steps[b]) / len(steps[b]) for b in bins]
    means = [sum(values[b]) / len(values[b]) for b in bins]
    # A curve from step 10 of 3000 starts at 0 in a reader's eyes.
    start = 0.0 if 0 < steps[0] <= 0.1 * steps[-1] else steps[0]
    x = axis(start, steps[-1], tight=True)
    levels = [*values, *([floor[0]] if floor else [])]
    y = axis(min(levels), max(levels))

    def at(step: float, value: float) -> tuple[float, float]:
        return x.percent(step), round(100 - y.percent(value), 2)

    def points(pairs: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{px:g},{py:g}" for px, py in pairs)

    band = ""
    if size > 1:
        upper = [at(c, max(values[b])) for c, b in zip(centres, bins, strict=True)]
        lower = [at(c, min(values[b])) for c, b in zip(centres, bins, strict=True)]
        band = points(upper + lower[::-1])
    every = math.ceil(len(centres) / MAX_HOVERS)
    marks = tuple(
        Mark(*at(c, m), f"{x_name} {c:,.0f}: {show(m)}")
        for c, m in list(zip(centres, means, strict=True))[::every]
    )
    point = None
    if marked:
        step, word = marked
        value = values[list(steps).index(step)]
        point = Mark(*at(step, value), f"{word} {show(value)} at {x_name} {step:,.0f}")
    level = Mark(*at(start, floor[0]), f"{floor[1]} {show(floor[0])}") if floor else None
    words = (
        f"{name}: from {show(values[0])} at {x_name} {steps[0]:,.0f} "
        f"to {show(values[-1])} at {x_name} {steps[-1]:,.0f}"
        + "".join(f"; {mark.words}" for mark in (point, level) if mark)
    )
    line = points([at(c, m) for c, m in zip(centres, means, strict=True)])
    return LineChart(name, x_name, x, y, line, band, marks, point, level, words)


@dataclass(frozen=True)
class Whisker:
    """A row of a forest plot: a value with its interval, in per cent of the axis."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Forest:
    """Intervals over one axis; ``zero`` is where zero lies on it."""

    axis: Axis
    rows: tuple[Whisker, ...]
    zero: float


def forest(intervals: Sequence[tuple[float, float, float]]) -> Forest:
    """A forest plot of (value, low, high) on an axis that starts at zero or spans it."""
    ends = [end for _, low, high in intervals for end in (low, high)]
    low, high = min(0.0, *ends), max(0.0, *ends)
    scale = axis(low, high, count=4)
    rows = tuple(Whisker(*(scale.percent(v) for v in row)) for row in intervals)
    return Forest(scale, rows, scale.percent(0.0))


@dataclass(frozen=True)
class Area:
    """An area in a box of 100 × 100, y downwards; ``even`` is the height of equal use."""

    points: str
    even: float


def usage_area(counts: Sequence[int]) -> Area:
    """Items per code, codes sorted by use, with the line at which all codes would be used alike."""
    ordered = sorted(counts, reverse=True)
    if len(ordered) > MAX_VERTICES:
        every = len(ordered) / MAX_VERTICES
        ordered = [ordered[int(i * every)] for i in range(MAX_VERTICES)]
    top, width = max(ordered, default=0) or 1, 100 / max(1, len(ordered))
    edges = []
    for i, c in enumerate(ordered):
        height = round(100 - 100 * c / top, 2)
        edges += [f"{i * width:.2f},{height:g}", f"{(i + 1) * width:.2f},{height:g}"]
    even = round(100 - 100 * sum(counts) / max(1, len(counts)) / top, 2)
    return Area(" ".join(["0,100", *edges, "100,100"]), even)


@dataclass(frozen=True)
class Node:
    name: str
    x: int
    y: int


@dataclass(frozen=True)
class Graph:
    """Stages as boxes, and edges as SVG paths, in a picture of ``width`` × ``height``."""

    width: int
    height: int
    node_width: int
    node_height: int
    nodes: tuple[Node, ...]
    edges: tuple[str, ...]


def stage_graph(parents: dict[str, set[str]]) -> Graph:
    """The DAG of stages from top to bottom, without the edges that longer ways imply.

    The longest chain runs down the first column; other stages stand beside it.

    Args:
        parents: stage → stages whose artifacts it read, in topological order.
    """
    width, height, gap_x, gap_y = 164, 34, 20, 26
    above: dict[str, set[str]] = {}
    depth: dict[str, int] = {}
    for name, direct in parents.items():
        known = direct & above.keys()
        above[name] = known.union(*(above[p] for p in known))
        depth[name] = 1 + max((depth[p] for p in known), default=-1)
    kept: dict[str, list[str]] = {}
    for name, direct in parents.items():
        implied = set().union(*(above[p] for p in direct & above.keys()))
        kept[name] = sorted(direct & above.keys() - implied)
    chain: set[str] = set()
    if depth:
        tip: str | None = max(depth, key=lambda n: depth[n])
        while tip is not None:
            chain.add(tip)
            tip = max(kept[tip], key=lambda n: depth[n], default=None)
    taken: dict[int, int] = {}
    place: dict[str, tuple[int, int]] = {}
    for name, level in depth.items():
        column = 0
        if name not in chain:
            taken[level] = column = taken.get(level, 0) + 1
        place[name] = (column * (width + gap_x), level * (height + gap_y))
    edges = []
    for name, direct_parents in kept.items():
        for parent in direct_parents:
            (x1, y1), (x2, y2) = place[parent], place[name]
            x1, x2, y1 = x1 + width // 2, x2 + width // 2, y1 + height
            bend = y2 - gap_y
            edges.append(f"M{x1} {y1}V{bend}C{x1} {y2 - 6} {x2} {bend + 6} {x2} {y2}")
    columns = 1 + max(taken.values(), default=0)
    return Graph(
        width=columns * (width + gap_x) - gap_x,
        height=(1 + max(depth.values(), default=0)) * (height + gap_y) - gap_y,
        node_width=width,
        node_height=height,
        nodes=tuple(Node(n, x, y) for n, (x, y) in place.items()),
        edges=tuple(edges),
    )
