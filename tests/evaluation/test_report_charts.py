"""Charts put every value where its axis says."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluation.report import charts

FINITE = st.floats(-1e6, 1e6).map(lambda v: round(v, 6))


def value_at(axis: charts.Axis, percent: float) -> float:
    return axis.low + percent / 100 * (axis.high - axis.low)


@given(FINITE, st.floats(1e-6, 1e6))
def test_an_axis_holds_its_data_and_its_ticks_say_where_they_stand(low: float, span: float) -> None:
    span = max(span, 1e-4 * abs(low))  # finer than this, labels meet the end of float precision
    axis = charts.axis(low, low + span)
    assert axis.low <= low + span * 1e-6
    assert axis.high >= low + span * (1 - 1e-6)
    assert 2 <= len(axis.ticks) <= 12
    step = (axis.high - axis.low) / (len(axis.ticks) - 1)
    for tick in axis.ticks:
        told = float(tick.label.replace("−", "-").replace(",", ""))
        # Positions are rounded to a hundredth of a per cent of the axis.
        assert abs(told - value_at(axis, tick.at)) <= 0.02 * step + 1e-9 * max(1, abs(told))


def test_an_axis_of_one_value_still_has_room() -> None:
    for value in (0.0, 0.3, -7.0):
        axis = charts.axis(value, value + value * 1e-15)
        assert axis.low < value < axis.high
        assert all(len(tick.label) < 8 for tick in axis.ticks)


def points(text: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (p.split(",") for p in text.split())]


def test_a_short_curve_is_drawn_point_by_point() -> None:
    chart = charts.line_chart(
        "loss", [0, 10, 20], [4.0, 1.0, 2.0], show=str, marked=(10, "best"), floor=(0.5, "at least")
    )
    assert chart.band == ""
    drawn = points(chart.line)
    assert [x for x, _ in drawn] == [0, 50, 100]
    assert [value_at(chart.y, 100 - y) for _, y in drawn] == pytest.approx([4, 1, 2], abs=1e-3)
    assert chart.marked is not None
    assert (chart.marked.x, chart.marked.words) == (50, "best 1.0 at step 10")
    assert chart.floor is not None
    assert value_at(chart.y, 100 - chart.floor.y) == pytest.approx(0.5, abs=1e-3)
    assert chart.words == (
        "loss: from 4.0 at step 0 to 2.0 at step 20; best 1.0 at step 10; at least 0.5"
    )


def test_a_long_curve_keeps_every_spike_in_its_band() -> None:
    values = [math.sin(s / 50) for s in range(5000)]
    values[1234] = 9.0
    chart = charts.line_chart("loss", list(range(5000)), values, show=str)
    assert len(points(chart.line)) <= charts.MAX_VERTICES
    assert len(chart.marks) <= charts.MAX_HOVERS
    top = min(y for _, y in points(chart.band))
    assert value_at(chart.y, 100 - top) == pytest.approx(9.0, abs=1e-2)


def test_a_curve_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="loss"):
        charts.line_chart("loss", [], [], show=str)


def test_a_forest_spans_zero_and_keeps_each_value_inside_its_interval() -> None:
    plot = charts.forest([(0.02, 0.01, 0.03), (-0.01, -0.02, 0.001)])
    assert value_at(plot.axis, plot.zero) == pytest.approx(0, abs=1e-5)
    for row in plot.rows:
        assert 0 <= row.low < row.at < row.high <= 100


def test_even_use_draws_a_full_box_and_a_dead_code_an_empty_slot() -> None:
    even = charts.usage_area([5, 5, 5, 5])
    assert even.even == 0
    assert {y for _, y in points(even.points)} == {0, 100}
    half = charts.usage_area([8, 0])
    assert half.even == 50
    assert (75.0, 100.0) not in points(half.points)  # a step, not a slope
    assert points(half.points)[3] == (50, 100)


def test_the_graph_leaves_out_what_a_longer_way_implies() -> None:
    graph = charts.stage_graph(
        {"a": set(), "b": {"a"}, "c": {"a", "b"}, "side": {"a"}, "end": {"c", "side", "a"}}
    )
    assert len(graph.edges) == 5  # a-b, b-c, a-side, c-end, side-end; not a-c, a-end
    place = {node.name: node for node in graph.nodes}
    assert [place[n].x for n in ("a", "b", "c", "end")] == [0, 0, 0, 0]
    assert place["side"].x > 0
    assert place["a"].y < place["b"].y < place["c"].y < place["end"].y
    for edge in graph.edges:
        assert max(float(v) for v in re.findall(r"-?\d+", edge)) <= max(graph.width, graph.height)
