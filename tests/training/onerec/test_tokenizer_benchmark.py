"""The benchmark of semantic ids compares like with like, at a size of seconds."""

from __future__ import annotations

import pytest

from benchmarks import tokenizer as benchmark
from components.training.onerec.tokenizer import semantic_ids as tokenizer


@pytest.mark.slow
def test_quick_run_has_every_comparison_and_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = []

    def fit(x_ND, config, seed):  # type: ignore[no-untyped-def]
        fitted.append((len(x_ND), config))
        return real(x_ND, config, seed)

    real = tokenizer.fit
    monkeypatch.setattr(tokenizer, "fit", fit)
    results = {result.name: result for result in benchmark.run(quick=True)}
    others = ("rq_vae_at_equal_cost", "rq_vae_at_10x_cost", "plain", "in_turn")
    raw = ("error", "lowest_entropy", "colliding")
    figures = (*raw, *(f"{figure}_after_repair" for figure in raw))
    names = {f"simulator_{figure}_vs_{other}" for figure in figures for other in others}
    assert set(results) == {*names, "simulator_seconds", "items_encoded_a_minute"}
    assert all(results[name].reference is not None for name in names)
    # The same items for all, and nobody repairs collisions before the raw figures are taken.
    assert {items for items, _ in fitted} == {300}
    assert {config.collisions for _, config in fitted} == {"keep"}
    # Ten times the time is ten times the training.
    assert max(config.rq_vae.epochs for _, config in fitted) > 5
    assert results["items_encoded_a_minute"].ours > 0
