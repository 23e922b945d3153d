"""`reelflow explain` names exactly what changed, and nothing that did not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_stages import Tiny

from components.pipeline.explain import describe_changes, explain, nearest_execution
from components.pipeline.manifest import Manifest
from components.pipeline.runner import Identity
from components.pipeline.stage import REGISTRY

IDENTITY = Identity(
    stage="s",
    code={"components.a": "1", "components.b": "2"},
    params={"lr": 0.1, "model": {"layers": 2, "heads": 4}},
    inputs={"items": "d1", "users": "d2"},
    external="e1",
    seed=0,
)


def published(identity: Identity, created_at: str = "2026-01-01") -> Manifest:
    return Manifest(
        {
            "code": identity.code,
            "params": identity.params,
            "inputs": identity.inputs,
            "external": identity.external,
            "created_at": created_at,
        }
    )


def lines(tiny: Tiny, folder: Path, name: str, *overrides: str) -> list[str]:
    return list(explain(tiny.runner(folder, *overrides), REGISTRY[name]))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"params": {"lr": 0.2, "model": {"layers": 2, "heads": 4}}}, "param lr: 0.1 → 0.2"),
        (
            {"params": {"lr": 0.1, "model": {"layers": 3, "heads": 4}}},
            "param model.layers: 2 → 3",
        ),
        ({"params": {"lr": 0.1, "model": {"layers": 2}}}, "param model.heads: 4 → 'absent'"),
        ({"code": {"components.a": "1", "components.b": "3"}}, "code components.b changed"),
        ({"code": {"components.a": "1"}}, "code components.b is gone"),
        (
            {"code": {"components.a": "1", "components.b": "2", "components.c": "3"}},
            "code components.c is new",
        ),
        ({"inputs": {"items": "d1", "users": "d3"}}, "input users changed"),
        ({"external": "e2"}, "the outside data changed"),
    ],
)
def test_each_kind_of_change_is_named_alone(now: dict[str, object], said: str) -> None:
    changed = replace(IDENTITY, **now)  # type: ignore[arg-type]
    assert describe_changes(changed, published(IDENTITY)) == [said]
    assert changed.key != IDENTITY.key


def test_no_change_is_no_line() -> None:
    assert describe_changes(IDENTITY, published(IDENTITY)) == []
    assert replace(IDENTITY).key == IDENTITY.key


def test_an_execution_is_compared_with_the_nearest_and_of_equals_with_the_newest() -> None:
    far = published(replace(IDENTITY, external="x", inputs={}), "2026-03-03")
    newer = published(replace(IDENTITY, external="y"), "2026-02-02")
    older = published(replace(IDENTITY, external="z"), "2026-01-01")
    assert nearest_execution(IDENTITY, [far, newer, older]) is newer


def test_a_stage_that_never_ran_says_so(tiny: Tiny, tmp_path: Path) -> None:
    assert lines(tiny, tmp_path, "numbers") == [
        f"numbers would run: it never ran in {tmp_path / 'store'}"
    ]


def test_a_stage_below_one_that_has_to_run_says_which(tiny: Tiny, tmp_path: Path) -> None:
    first, second = lines(tiny, tmp_path, "total")
    assert first == "total would run: a stage above it has to run first"
    assert "of stage 'numbers'" in second
    tiny.run(tmp_path)
    _, second = lines(tiny, tmp_path, "total", "doubled.factor=4")
    assert "of stage 'doubled'" in second
    assert "param factor: 2.0 → 4.0" in second


def test_a_cached_stage_shows_its_key_and_inputs(tiny: Tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path)
    runner = tiny.runner(tmp_path)
    runner.resolve_upstream(REGISTRY["doubled"])
    key = runner.identify(REGISTRY["doubled"]).key
    digest = runner.done["numbers"].output_digest("numbers")
    first, *rest = lines(tiny, tmp_path, "doubled")
    assert first.startswith(f"doubled is cached (key {key}, made 20")
    assert f"  input numbers: {digest[:12]}" in rest


def test_a_changed_parameter_and_input_are_named(tiny: Tiny, tmp_path: Path) -> None:
    tiny.run(tmp_path)
    assert lines(tiny, tmp_path, "numbers", "numbers.count=6")[1:] == ["  param count: 5 → 6"]
    tiny.runner(tmp_path, "numbers.count=6").execute(REGISTRY["numbers"])
    overrides = ("numbers.count=6", "doubled.rounding.digits=1")
    assert lines(tiny, tmp_path, "doubled", *overrides)[1:] == [
        "  param rounding.digits: 2 → 1",
        "  input numbers changed",
    ]
    tiny.outside = "data of tomorrow"
    assert lines(tiny, tmp_path, "numbers")[1:] == ["  the outside data changed"]
