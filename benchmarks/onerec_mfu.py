"""OneRec's utilisation of one device in training and inference, step by step of what was done.

Model FLOPs by `components.training.onerec.flops` over seconds over the device's peak of *dense*
bf16 products. The ladder is cumulative: each rung keeps what the one below it changed. Ids are
random, all histories are full. Without a GPU the same code runs at a tiny size, and FLOP/s are
shown without a utilisation, because nobody publishes a peak for the processor at hand.

`train_recommender` trains as on the rung ``fused_optimiser`` (batches with padding as on the rungs
before ``no_mask``); ``compiled`` and ``shared_context`` are what this benchmark adds. Inference is
the product's beam search; bf16 weights and compiled layers are what the benchmark adds to it. The
time in which batches are put together and copied to the device is not in these figures.

It needs torch, NumPy and PyArrow alone; on a bare machine with a GPU it is
``python -m benchmarks.onerec_mfu [training] [inference] [--quick]``, which writes every figure as a
line of JSON as soon as it is there.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from benchmarks.result import Result, Sample, measure, print_lines

if TYPE_CHECKING:
    from components.training.onerec.config import TrainConfig
    from components.training.onerec.data import Batch
    from components.training.onerec.decode import DeviceTrie
    from components.training.onerec.model import OneRec

SUMMARY = "utilisation of a device by OneRec in training and inference (MFU), and what gave it"

#: Dense bf16 FLOP/s of a device by a part of its name; the first that fits counts.
PEAKS = (
    ("H200", 989e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L20", 119.5e12),
)
PEAK_VARIABLE = "REELFLOW_PEAK_FLOPS"
#: What is to be reached; the second is what the report states of its serving (section 1).
TRAINING_MFU, INFERENCE_MFU = 0.35, 0.288
#: Samples of one request that are trained together.
SAMPLES_A_REQUEST = 4
#: What `train_step` reads of a training's parameters.
RULES = cast(
    "TrainConfig",
    SimpleNamespace(learning_rate=1e-4, weight_decay=0.1, clip=1.0, seed=0, balance_rate=1e-3),
)


@dataclass(frozen=True)
class Size:
    """What is measured at one size.

    Attributes:
        config: fields of the architecture (`named_configs`).
        items: catalogue.
        batch: training samples a step.
        requests: requests of one inference call; the first is that of the ladder.
        beams: beam width.
        repeats: measurements of each figure.
        compiled: whether `torch.compile` is a rung.
    """

    config: dict[str, Any]
    items: int
    batch: int
    requests: tuple[int, ...]
    beams: int
    repeats: int
    compiled: bool


@dataclass(frozen=True)
class Rung:
    """What is switched on.

    Attributes:
        attention: a kernel of attention, or by plain products.
        masked: attention of the encoder takes a mask, though nothing is padded.
        fused_optimiser: one kernel updates all parameters, or one after the other.
        half: weights are bf16, not cast at every use.
        compiled: by `torch.compile`: the model in training, layers in inference.
        grouped: samples of one request share its context.
    """

    name: str
    attention: bool = False
    masked: bool = True
    fused_optimiser: bool = False
    half: bool = False
    compiled: bool = False
    grouped: bool = False

    @contextlib.contextmanager
    def kernels(self) -> Iterator[None]:
        """Attention by plain products, unless the rung has kernels."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with contextlib.nullcontext() if self.attention else sdpa_kernel(SDPBackend.MATH):
            yield


def rungs(size: Size, part: str) -> list[Rung]:
    """From plain to all that is done, one change a rung; ``part`` is training or inference."""
    changes: list[dict[str, Any]] = [
        {"name": "attention_kernel", "attention": True},
        {"name": "no_mask", "masked": False},
    ]
    if part == "training":
        changes.append({"name": "fused_optimiser", "fused_optimiser": True})
    else:
        changes.append({"name": "bf16_weights", "half": True})
    if size.compiled:
        changes.append({"name": "compiled", "compiled": True})
    if part == "training":
        changes.append({"name": "shared_context", "grouped": True})
    ladder = [Rung("plain")]
    for change in changes:
        ladder.append(replace(ladder[-1], **change))
    return ladder


def size_for(device: str, quick: bool) -> Size:
    """The report's 0.121B on a GPU; elsewhere, or if quick, the same architecture very small."""
    from components.training.onerec.named_configs import named_values

    if device == "cuda" and not quick:
        return Size(named_values("0p121b"), 1_000_000, 256, (32, 8, 1), 512, 10, True)
    small: dict[str, Any] = {
        "d_model": 32,
        "heads": 2,
        "ffn": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    small |= {"codebook_size": 64, "positive_feedback": 16, "feature_width": 8}
    small |= {"author_rows": 50, "tag_rows": 20, "static_rows": [30, 4, 16]}
    small |= {"lifelong": {"entries": 40, "queries": 4, "blocks": 2, "leaf": 20}}
    return Size(named_values("0p121b", **small), 2_000, 16, (4, 1), 16, 3, False)


def run(quick: bool = False) -> list[Result]:
    """Samples and requests a second, FLOP/s and utilisation on every rung."""
    return [*figures("training", quick), *figures("inference", quick)]


def figures(part: str, quick: bool) -> Iterator[Result]:
    """The ladder of one part: training or inference."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"training": training, "inference": inference}[part](size_for(device, quick), device)


def device_peak() -> float | None:
    """Dense bf16 FLOP/s of the device, None where it is not known.

    ``REELFLOW_PEAK_FLOPS`` says it for other devices.
    """
    import torch

    said = os.environ.get(PEAK_VARIABLE)
    if said:
        return float(said)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAKS if part in name), None)


def training(size: Size, device: str) -> Iterator[Result]:
    """The ladder of a training step."""
    import torch

    from benchmarks.synthetic_onerec import catalogue, full_batch
    from components.training.onerec.flops import TRAINING_FACTOR, sample_flops
    from components.training.onerec.named_configs import plain_config
    from components.training.onerec.train import make_optimiser, train_step

    config = plain_config(size.config)
    codes_NQ = catalogue(size.items, config.codebook_size)
    batch = full_batch(config, codes_NQ, size.batch, device=device)
    for rung in rungs(size, "training"):
        model = new_model(config, device)
        flops = sample_flops(model)
        count = TRAINING_FACTOR * flops.forward * size.batch
        samples, fed = size.batch, replace(batch, is_padded=rung.masked)
        if rung.grouped:
            samples *= SAMPLES_A_REQUEST
            count += TRAINING_FACTOR * flops.target * (samples - size.batch)
            fed = replace(fed, target_BQ=fed.target_BQ.repeat_interleave(SAMPLES_A_REQUEST, 0))
        optimiser = make_optimiser(model, RULES)
        if not rung.fused_optimiser:
            groups = [{"params": group["params"]} for group in optimiser.param_groups]
            optimiser = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=False)
        if rung.compiled:
            model.compile()
        with rung.kernels():
            taken = measure(_training_step(train_step, model, optimiser, fed), size.repeats, 3)
        yield from _figures(f"training_{rung.name}", taken, samples, count, TRAINING_MFU)
        del model, optimiser
        _free()


def _training_step(
    train_step: Callable[..., Any], model: OneRec, optimiser: Any, batch: Batch
) -> Callable[[], None]:
    def step() -> None:
        train_step(model, model, optimiser, batch, 1e-4, RULES, 0, 0)
        _wait(batch)

    return step


def inference(size: Size, device: str) -> Iterator[Result]:
    """The ladder of a beam search, then fewer requests at once."""
    from benchmarks.synthetic_onerec import catalogue, device_trie, full_batch
    from components.training.onerec.flops import request_flops
    from components.training.onerec.named_configs import plain_config

    config = plain_config(size.config)
    codes_NQ = catalogue(size.items, config.codebook_size)
    trie = device_trie(codes_NQ, device)
    requests = size.requests[0]
    batch = full_batch(config, codes_NQ, requests, device=device)
    count = request_flops(new_model(config, device), size.beams).forward
    for rung in rungs(size, "inference"):
        model = serving_model(config, device, rung)
        fed = replace(batch, is_padded=rung.masked)
        with rung.kernels():
            taken = measure(search(model, trie, fed, size.beams), size.repeats, 3)
        name = f"inference_{rung.name}"
        yield from _figures(name, taken, requests, count * requests, INFERENCE_MFU)
        del model
        _free()
    for requests in size.requests[1:]:
        # A compiled model of its own, for the shapes of this number.
        model = serving_model(config, device, rung)
        fed = full_batch(config, codes_NQ, requests, device=device)
        taken = measure(search(model, trie, fed, size.beams), size.repeats, 3)
        name = f"inference_{requests}_at_once"
        yield from _figures(name, taken, requests, count * requests, INFERENCE_MFU)
        del model
        _free()


def new_model(config: Any, device: str) -> OneRec:
    """A model with random weights."""
    import torch

    from components.training.onerec.model import OneRec

    torch.manual_seed(0)
    with torch.device(device):
        return OneRec(config)


def serving_model(config: Any, device: str, rung: Rung) -> OneRec:
    """A model to search with, as a rung has it."""
    import torch

    model = new_model(config, device).eval()
    if rung.half:
        model = model.to(torch.bfloat16)
    if rung.compiled:
        # One graph for all layers of a kind; what a search does between them is gathers and a
        # sort a level.
        for layer in model.encoder:
            layer.compile()
        for layer in model.decoder:
            layer.step = torch.compile(layer.step)  # type: ignore[assignment,arg-type]
    return model


def search(model: OneRec, trie: DeviceTrie, batch: Batch, beams: int) -> Callable[[], None]:
    """One beam search, waited for; in bf16 on a GPU."""
    import torch

    from components.training.onerec.decode import beam_search

    device, half = batch.target_BQ.device.type, model.position.dtype == torch.bfloat16

    def call() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda" and not half):
            beam_search(model, trie, batch, beams)
        _wait(batch)

    return call


def _figures(
    name: str, taken: Sample, samples: int, count: int, to_reach: float
) -> Iterator[Result]:
    """Samples a second, FLOP/s, and where the device's peak is known their share of it."""
    yield _rate(f"{name}_per_second", taken, samples, "1/s")
    yield _rate(f"{name}_teraflops", taken, count / 1e12, "TFLOP/s")
    peak = device_peak()
    if peak is not None:
        yield _rate(f"{name}_mfu", taken, count / peak, "of peak", to_reach)


def _rate(
    name: str, taken: Sample, work: float, unit: str, reference: float | None = None
) -> Result:
    low, high = work / taken.high, work / taken.low
    return Result(name, work / taken.median, reference, unit, low, high, taken.n, True)


def _wait(batch: Batch) -> None:
    import torch

    if batch.target_BQ.is_cuda:
        torch.cuda.synchronize()


def _free() -> None:
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str]) -> None:
    """Figures of the parts that are named, of both if none is."""
    parts = [part for part in ("training", "inference") if part in arguments]
    for part in parts or ("training", "inference"):
        print_lines(figures(part, "--quick" in arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
