"""The benchmark of semantic ids compares like with like, at a size of seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import tokenizer as benchmark
from components.training.onerec.config import TokenizerConfig
from components.training.onerec.tokenizer import semantic_ids as tokenizer


@pytest.mark.slow
def test_quick_run_has_every_comparison_and_the_speed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fitted = []

    def fit(x_ND, config, seed):  # type: ignore[no-untyped-def]
        fitted.append((len(x_ND), config))
        return real(x_ND, config, seed)

    real = tokenizer.fit
    monkeypatch.setattr(tokenizer, "fit", fit)
    results = {result.name: result for result in benchmark.run(quick=True)}
    others = ("rq_vae_at_equal_cost", "rq_vae_at_5x_cost", "plain", "in_turn")
    levels = [f"{f}_{n}" for f in ("error", "entropy", "utilisation") for n in (1, 2, 3)]
    repaired = [f"{f}_after_repair" for f in ("error", "lowest_entropy", "colliding")]
    figures = (*levels, "lowest_entropy", "colliding", *repaired)
    names = {f"simulator_{figure}_vs_{other}" for figure in figures for other in others}
    assert set(results) == {*names, "simulator_seconds", "items_encoded_a_minute"}
    assert all(results[name].reference is not None for name in names)
    # The same items for all, and nobody repairs collisions before the raw figures are taken.
    assert {items for items, _ in fitted} == {300}
    assert {config.collisions for _, config in fitted} == {"keep"}
    # Five times the time is more training, and both widths are tried at each cost.
    tried = {(config.rq_vae.latent, config.rq_vae.epochs) for _, config in fitted}
    assert {latent for latent, _ in tried} == {32, 128}
    assert max(epochs for _, epochs in tried) > 5
    error = {n: results[f"simulator_error_{n}_vs_plain"] for n in (1, 2, 3)}
    assert error[1].ours > error[2].ours > error[3].ours > 0
    assert results["simulator_utilisation_1_vs_plain"].ours == 1
    # A line a part: the embeddings, each method.
    said = capfd.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("simulator: ")] == [
        "embeddings", "balanced", *others
    ]  # fmt: skip
    assert results["items_encoded_a_minute"].ours > 0


@pytest.mark.parametrize(("errors", "chosen"), [((0.3, 0.2), 128), ((0.2, 0.3), 32)])
def test_of_rq_vaes_widths_that_with_the_lower_error_is_reported(
    errors: tuple[float, float], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Balanced takes a second and an epoch of RQ-VAE a hundredth; errors are as given."""
    by_latent = dict(zip((32, 128), errors, strict=True))
    x_ND, seen = torch.randn(20, 4), []
    stats = tokenizer.measure(x_ND, tokenizer.fit(x_ND, TokenizerConfig(codebook_size=4), 0))

    def fit(x_ND: torch.Tensor, config: TokenizerConfig, seed: int) -> benchmark.Fitted:
        own, is_vae = config.rq_vae, config.method == "rq_vae"
        seen.append((config.method, own.latent, own.epochs, seed))
        error = by_latent[own.latent] if is_vae else 0.1
        found = replace(stats, relative_error=(error,) * 3)
        return benchmark.Fitted(found, found, own.epochs / 100 if is_vae else 1.0)

    monkeypatch.setattr(benchmark, "fit", fit)
    results = {r.name: r for r in benchmark.compare("x", x_ND, range(3))}
    for cost, epochs in (("equal", 100), ("5x", 500)):
        assert results[f"x_error_3_vs_rq_vae_at_{cost}_cost"].reference == min(errors)
        seeds = [s for m, latent, n, s in seen if (m, latent, n) == ("rq_vae", chosen, epochs)]
        assert seeds == [0, 1, 2]
