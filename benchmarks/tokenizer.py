"""Semantic ids: balanced residual k-means against RQ-VAE on real item embeddings, and speed.

Embeddings come from the flow's own stages (`reelflow run recommend --until align_items`) of
Amazon Scientific (text) and KuaiRand-Pure (behaviour) where those data sets are at hand, of the
simulator elsewhere. All quantisers have the same embeddings, codebook size, levels and seeds.
RQ-VAE is trained for as long as balanced k-means takes ("equal cost"), and for five times as long.
At each cost it is tried in all `WIDTHS` on the first seed; that with the lowest error is trained on
all seeds, and has the figures. Where embeddings are wide, a narrow latent space costs it much.

Figures are those of Table 11 of arXiv 2506.13695 and collisions, of the codes as the quantiser
gives them; balanced k-means avoids collisions by itself, as part of its clustering and of its cost.
Those that end in ``_after_repair`` are of the codes after all methods had items of the same codes
told apart (`told_apart`), as the flow does. A number is the level: ``error_2`` is of the first two
together. Errors are mean squared errors divided by the variance of the embedding, entropies are in
nats, ``lowest_entropy`` is that of the level where it is lowest. Encoding is timed at the size of
the report's codebooks: 8192 codes, 3 levels, 64 dimensions.

Some six minutes on two cores with both data sets; a line tells of each part that is done.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
MORE = 5
LEVELS = 3
#: Of RQ-VAE: the space that is quantised, and the hidden layers on the way there, none narrower.
WIDTHS: tuple[dict[str, Any], ...] = (
    {"latent": 32, "hidden": [256, 128]},
    {"latent": 128, "hidden": [256]},
)


def run(quick: bool = False) -> list[Result]:
    """Compare and time; ``quick`` is a tiny simulated catalogue and one seed."""
    results = []
    for name, embedding_ND in embeddings(quick):
        items, width = embedding_ND.shape
        print(f"{name}: embeddings of {items} items in {width} dimensions", flush=True)
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

    def fit_all(what: str, config: TokenizerConfig, known: Sequence[Fitted] = ()) -> list[Fitted]:
        """Fit on all seeds, of which the first are known."""
        fitted = [*known, *(fit(x_ND, config, seed) for seed in seeds[len(known) :])]
        took = statistics.median(of.seconds for of in fitted)
        error = statistics.median(of.raw.relative_error[-1] for of in fitted)
        print(f"{name}: {what} done, {took:.2f} s a seed, error {error:.4f}", flush=True)
        return fitted

    ours = fit_all("balanced", config("balanced"))
    seconds = sorted(of.seconds for of in ours)
    cost = statistics.median(seconds)
    paces = [(width, Pace.of(x_ND, width, cost)) for width in WIDTHS]
    others: dict[str, list[Fitted]] = {}
    for other, within in (
        ("rq_vae_at_equal_cost", cost),
        (f"rq_vae_at_{MORE}x_cost", MORE * cost),
    ):
        tried = [
            config("rq_vae", {**width, "epochs": pace.within(within)}) for width, pace in paces
        ]
        first = [fit(x_ND, theirs, seeds[0]) for theirs in tried]
        errors = [of.raw.relative_error[-1] for of in first]
        best = errors.index(min(errors))
        own = tried[best].rq_vae
        what = f"{other} (latent {own.latent}, {own.epochs} epochs)"
        others[other] = fit_all(what, tried[best], first[best : best + 1])
    others |= {other: fit_all(other, config(other)) for other in ("plain", "in_turn")}

    found = [Result(f"{name}_seconds", cost, None, "s", seconds[0], seconds[-1], len(ours), False)]
    for other, fitted in others.items():
        for figure, (read, unit, higher) in FIGURES.items():
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


def config(method: str, rq_vae: dict[str, Any] | None = None) -> TokenizerConfig:
    from components.training.onerec.config import TokenizerConfig

    given = {"method": method, "collisions": "keep", "num_levels": LEVELS, "rq_vae": rq_vae or {}}
    return TokenizerConfig.model_validate(given)


class Fitted(NamedTuple):
    """Statistics of ids on the items themselves, as they were given and after items with the same
    codes were told apart, and the seconds that fitting took."""

    raw: TokenizerStats
    repaired: TokenizerStats
    seconds: float


def _level(table: str, level: int) -> Callable[[Fitted], float]:
    return lambda of: float(getattr(of.raw, table)[level - 1])


#: How each is read, its unit, and whether higher is better.
FIGURES: dict[str, tuple[Callable[[Fitted], float], str, bool]] = {
    **{
        f"{figure}_{level}": (_level(table, level), unit, higher)
        for figure, table, unit, higher in (
            ("error", "relative_error", "of the variance", False),
            ("entropy", "entropy", "nats", True),
            ("utilisation", "utilisation", "of the codes", True),
        )
        for level in range(1, LEVELS + 1)
    },
    "lowest_entropy": (lambda of: min(of.raw.entropy), "nats", True),
    "colliding": (lambda of: float(of.raw.colliding), "items", False),
    "error_after_repair": (lambda of: of.repaired.relative_error[-1], "of the variance", False),
    "lowest_entropy_after_repair": (lambda of: min(of.repaired.entropy), "nats", True),
    "colliding_after_repair": (lambda of: float(of.repaired.colliding), "items", False),
}


def fit(x_ND: Tensor, config: TokenizerConfig, seed: int) -> Fitted:
    from components.training.onerec.tokenizer import semantic_ids as tokenizer

    start = time.perf_counter()
    ids = tokenizer.fit(x_ND, config, seed)
    took = time.perf_counter() - start
    repaired = tokenizer.told_apart(x_ND, ids)
    return Fitted(tokenizer.measure(x_ND, ids), tokenizer.measure(x_ND, repaired), took)


class Pace(NamedTuple):
    """How fast RQ-VAE trains: so many epochs took so many seconds, one more takes so many."""

    epochs: int
    seconds: float
    each: float

    @classmethod
    def of(cls, x_ND: Tensor, width: dict[str, Any], seconds: float) -> Pace:
        """Train for twice as long again and again, until that takes half of that time.

        Of what is much shorter, what comes before the epochs is too large a part.
        """

        def took(epochs: int) -> float:
            return fit(x_ND, config("rq_vae", {**width, "epochs": epochs}), 0).seconds

        epochs, before, now = 1, 0.0, took(1)
        while now < seconds / 2:
            epochs, before, now = 2 * epochs, now, took(2 * epochs)
        return cls(epochs, now, max(now - before, now / 8) / max(1, epochs // 2))

    def within(self, seconds: float) -> int:
        """Epochs of that time; one at least, before which there is no result."""
        return max(1, self.epochs + int((seconds - self.seconds) / self.each))


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
