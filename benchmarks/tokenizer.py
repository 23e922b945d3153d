"""Semantic ids: balanced residual k-means against RQ-VAE on real item embeddings, and speed.

Embeddings come from the flow's own stages (`reelflow run recommend --until align_items`) of
Amazon Scientific (text) and KuaiRand-Pure (behaviour) where those data sets are at hand, of the
simulator elsewhere. All quantisers have the same embeddings, codebook size, levels and seeds.
RQ-VAE is trained for as long as balanced k-means takes ("equal cost"), and for ten times as long.

Every figure is of the codes as the quantiser gives them; balanced k-means avoids collisions by
itself, as part of its clustering and of its cost. Those that end in ``_after_repair`` are of the
codes after all methods had items of the same codes told apart (`told_apart`), as the flow does.
Errors are mean squared errors divided by the variance of the embedding; entropy, in nats, is that
of the level where it is lowest. Encoding is timed at the size of the report's codebooks: 8192
codes, 3 levels, 64 dimensions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.flow_runs import run_flow, shared_data
from benchmarks.result import Result, measure

if TYPE_CHECKING:
    from torch import Tensor

    from components.training.onerec.config import TokenizerConfig
    from components.training.onerec.tokenizer.semantic_ids import TokenizerStats

SUMMARY = "Semantic ids: balanced residual k-means against RQ-VAE, and items encoded a minute"

DATA = ("amazon_scientific", "kuairand_pure")
#: Items a minute to reach on two cores.
TARGET_ITEMS = 1e6
MORE = 10


def run(quick: bool = False) -> list[Result]:
    """Compare and time; ``quick`` is a tiny simulated catalogue and one seed."""
    results = []
    for name, embedding_ND in embeddings(quick):
        results += compare(name, embedding_ND, seeds=range(1 if quick else 3))
    return [*results, encoding(1_000 if quick else 200_000, codes=64 if quick else 8192)]


def embeddings(quick: bool) -> Iterator[tuple[str, Tensor]]:
    """Item embeddings by name of the data, as the flow makes them."""
    known = {} if quick else {name: shared_data(name) for name in DATA}
    settings = SMALL if quick else ()
    found: dict[str, Path | None] = {name: place for name, place in known.items() if place}
    sources = found or {"simulator": None}
    for name, place in sources.items():
        with tempfile.TemporaryDirectory(prefix="bench_tokenizer_") as home:
            artifacts = run_flow(Path(home), "align_items", settings, place)
            yield name, artifacts["aligned_embedding"].load_state_dict()["embedding"]


#: A run of a few seconds.
SMALL = (
    *(f"ingest.simulator.{s}" for s in ("users=200", "items=300", "interactions=8000")),
    "ingest.simulator.render_videos=false",
    "validate.great_expectations=false",
    "align_items.steps=5",
)


def compare(name: str, x_ND: Tensor, seeds: range) -> list[Result]:
    """Balanced k-means beside RQ-VAE at equal cost and at more, and beside the other k-means."""
    ours = [fit(x_ND, config("balanced"), seed) for seed in seeds]
    seconds = sorted(of.seconds for of in ours)
    cost = statistics.median(seconds)
    others = {
        "rq_vae_at_equal_cost": config("rq_vae", epochs=epochs_within(x_ND, cost)),
        f"rq_vae_at_{MORE}x_cost": config("rq_vae", epochs=epochs_within(x_ND, MORE * cost)),
        "plain": config("plain"),
        "in_turn": config("in_turn"),
    }
    figures: dict[str, tuple[Callable[[Fitted], float], str, bool]] = {
        "error": (lambda of: of.raw.relative_error[-1], "of the variance", False),
        "lowest_entropy": (lambda of: min(of.raw.entropy), "nats", True),
        "colliding": (lambda of: float(of.raw.colliding), "items", False),
        "error_after_repair": (lambda of: of.repaired.relative_error[-1], "of the variance", False),
        "lowest_entropy_after_repair": (lambda of: min(of.repaired.entropy), "nats", True),
        "colliding_after_repair": (lambda of: float(of.repaired.colliding), "items", False),
    }
    found = [Result(f"{name}_seconds", cost, None, "s", seconds[0], seconds[-1], len(ours), False)]
    for other, theirs in others.items():
        fitted = [fit(x_ND, theirs, seed) for seed in seeds]
        for figure, (read, unit, higher) in figures.items():
            mine = sorted(read(of) for of in ours)
            reference = statistics.median(read(of) for of in fitted)
            found.append(
                Result(
                    f"{name}_{figure}_vs_{other}",
                    statistics.median(mine),
                    reference,
                    unit,
                    mine[0],
                    mine[-1],
                    len(mine),
                    higher,
                )
            )
    return found


def config(method: str, epochs: int = 1) -> TokenizerConfig:
    from components.training.onerec.config import TokenizerConfig

    given = {"method": method, "collisions": "keep", "rq_vae": {"epochs": epochs}}
    return TokenizerConfig.model_validate(given)


class Fitted(NamedTuple):
    """Statistics of ids on the items themselves, as they were given and after items with the same
    codes were told apart, and the seconds that fitting took."""

    raw: TokenizerStats
    repaired: TokenizerStats
    seconds: float


def fit(x_ND: Tensor, config: TokenizerConfig, seed: int) -> Fitted:
    from components.training.onerec.tokenizer import semantic_ids as tokenizer

    start = time.perf_counter()
    ids = tokenizer.fit(x_ND, config, seed)
    took = time.perf_counter() - start
    repaired = tokenizer.told_apart(x_ND, ids)
    return Fitted(tokenizer.measure(x_ND, ids), tokenizer.measure(x_ND, repaired), took)


def epochs_within(x_ND: Tensor, seconds: float) -> int:
    """How long RQ-VAE may train in that time; an epoch at least, before which it has no result.

    Trained for twice as long again and again, until that takes half of the time: of what is much
    shorter, what comes before the epochs is too large a part.
    """

    def took(epochs: int) -> float:
        return fit(x_ND, config("rq_vae", epochs=epochs), 0).seconds

    epochs, before, now = 1, 0.0, took(1)
    while now < seconds / 2:
        epochs, before, now = 2 * epochs, now, took(2 * epochs)
    each = max(now - before, now / 8) / max(1, epochs // 2)
    return max(1, epochs + int((seconds - now) / each))


def encoding(items: int, codes: int) -> Result:
    """Items a minute under frozen codebooks."""
    import torch

    from components.training.onerec.tokenizer.rq_kmeans import RQKMeans
    from components.training.onerec.tokenizer.semantic_ids import encode

    random = torch.Generator().manual_seed(0)
    x_ND = torch.randn(items, 64, generator=random)
    quantizer = RQKMeans(torch.randn(3, codes, 64, generator=random))
    took = measure(lambda: encode(x_ND, quantizer), repeats=3)
    rate = 60 * items
    return Result(
        "items_encoded_a_minute",
        rate / took.median,
        TARGET_ITEMS,
        "items/min",
        rate / took.high,
        rate / took.low,
        took.n,
        True,
    )
