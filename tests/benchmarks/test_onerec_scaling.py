"""The scaling study: what its arms train, and the law through what they gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.onerec_scaling import (
    FIXED,
    SMALL,
    Arm,
    arms_by_features,
    arms_by_width,
    draw,
    fit_law,
    law_figures,
)
from components.pipeline.params import load_params
from components.pipeline.stage import load_registry

SIZES = (10_000, 40_000, 160_000, 640_000)


def model_of(*settings: str) -> Any:
    params = load_params(load_registry(), overrides=settings)["train_recommender"]
    return params.model  # type: ignore[attr-defined]


@pytest.mark.parametrize("fixed", [FIXED, SMALL])
def test_each_feature_arm_reads_what_its_name_says_beside_all_before_it(
    fixed: tuple[str, ...],
) -> None:
    arms = arms_by_features()
    assert [*arms] == [
        "positive_feedback",
        "short_term",
        "static",
        "authors_and_tags",
        "content",
        "lifelong",
    ]
    for place, settings in enumerate(arms.values()):
        model = model_of(*fixed, *settings)
        reads = [
            model.positive_feedback > 0,
            model.short_term > 1,
            model.features.static,
            model.features.authors > 0 and model.features.tags > 0,
            model.features.content,
            model.lifelong.entries > 0,
        ]
        assert reads == [i <= place for i in range(len(reads))]
        if place < 3:
            assert not model.features.authors
            assert not model.features.tags


def test_widths_are_trained_at_each_seed() -> None:
    model = model_of(*FIXED, *arms_by_width(128, 2))
    assert (model.d_model, model.ffn) == (128, 256)
    assert (model.memory.successors, model.item_input) == (0, "sid")
    # The ids that losses are of stay the same.
    one, other = (
        load_params(load_registry(), overrides=arms_by_width(32, seed)) for seed in (1, 2)
    )
    assert [stage for stage in one if one[stage] != other[stage]] == ["train_recommender"]
    assert (one["train_recommender"].seed, other["train_recommender"].seed) == (1, 2)  # type: ignore[attr-defined]


def test_the_law_is_found_again() -> None:
    law = fit_law([(n, 3.0 + 50 / n**0.4) for n in SIZES])
    assert law is not None
    assert law.floor == pytest.approx(3.0, abs=0.05)
    assert law.exponent == pytest.approx(0.4, abs=0.05)
    assert law.r2 > 0.999
    assert law(np.array([20_000.0]))[0] == pytest.approx(3.0 + 50 / 20_000**0.4, abs=0.01)


def test_losses_that_do_not_fall_have_no_law() -> None:
    assert fit_law([(n, 5.0 + 0.1 * place) for place, n in enumerate(SIZES)]) is None


def losses(noise: float, seed: int, factor: float = 50.0) -> dict[int, list[Arm]]:
    rng = np.random.default_rng(seed)
    return {
        n: [Arm(n, 3.0 + factor / n**0.4 + noise * rng.normal(), 0.0, 0.0) for _ in range(3)]
        for n in SIZES
    }


def test_the_interval_of_a_law_tells_how_little_noisy_losses_say() -> None:
    def interval(noise: float) -> tuple[float, float]:
        law, rows = law_figures(losses(noise, 1))
        assert law is not None
        (found,) = (r for r in rows if r.name == "law_exponent")
        assert found.low <= law.exponent <= found.high
        return found.low, found.high

    quiet, noisy = interval(0.001), interval(0.1)
    assert quiet[0] <= 0.41
    assert quiet[1] >= 0.39
    assert noisy[1] - noisy[0] > 5 * (quiet[1] - quiet[0])


def test_flat_losses_seldom_have_a_law() -> None:
    found = [law_figures(losses(0.02, seed, factor=0.0)) for seed in range(20)]
    assert sum(law is not None for law, _ in found) <= 2
    for law, rows in found:
        assert [row.name for row in rows][:1] == ["law_missing"]
        assert (rows[0].ours <= 0.025) == (law is not None) == (len(rows) == 5)


@pytest.mark.parametrize("noise", [0.002, None])
def test_the_figure_shows_each_arm_and_a_law_only_where_there_is_one(
    noise: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REELFLOW_BENCH_FIGURES", str(tmp_path / "figures"))
    arms = losses(noise or 0.0, 0, factor=0.0 if noise is None else 50.0)
    law, _ = law_figures(arms)
    beams = [("beams_8_hr_at_10", 0.1, "users")]
    beams += [(f"beams_512_pass_at_{k}", k / 1_000, "users") for k in (8, 32, 128, 512)]
    drawn = draw(
        arms, law, {k: Arm(1, 2.0, 0.1, 0.2) for k in (32, 64)}, beams, {"static": arms[SIZES[0]]}
    )
    text = drawn.read_text()
    assert drawn == tmp_path / "figures" / "onerec_scaling.svg"
    assert (law is None) == (noise is None)
    assert ("legend" in text) == (law is not None)
    # A marker for each arm of each size.
    assert text.count("<use") >= sum(map(len, arms.values()))
