"""What two ways of computing give: keys shared by all beams, and experts in grouped products.

A beam search of one request with keys and values that all beams share, against the same weights
with a copy for each beam, as libraries keep it; and a step of a mixture of experts, forward and
backward, in grouped products against one product after the other. Both pairs are compared in their
results before they are timed. Needs torch, NumPy and PyArrow alone; on a bare machine it is
``python -m benchmarks.onerec_kernels``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from benchmarks.onerec_mfu import Rung, search, serving_model, size_for
from benchmarks.result import Result, Sample, measure, print_lines

if TYPE_CHECKING:
    from torch import Tensor

    from components.training.onerec.model import OneRec

SUMMARY = "OneRec: keys shared by beams against copies, grouped experts against one by one"

#: Positions, width, experts and active experts of the mixture that is timed.
EXPERTS = {"cuda": (256 * 3, 1024, 24, 2), "cpu": (64, 32, 6, 2)}


def run(quick: bool = False) -> list[Result]:
    """Milliseconds a request at two beam widths, and a step of a mixture."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [*shared_keys(device, quick), grouped_experts(device)]


def shared_keys(device: str, quick: bool) -> Iterator[Result]:
    """One request's beam search with shared and with copied keys."""
    from benchmarks.synthetic_onerec import catalogue, device_trie, full_batch
    from components.training.onerec.decode import beam_search
    from components.training.onerec.named_configs import plain_config

    size = size_for(device, quick)
    config = plain_config(size.config)
    codes_NQ = catalogue(size.items, config.codebook_size)
    trie = device_trie(codes_NQ, device)
    batch = full_batch(config, codes_NQ, 1, device=device)
    model = serving_model(config, device, Rung("", attention=True, half=device == "cuda"))
    for beams in (size.beams // 8, size.beams):
        call = search(model, trie, batch, beams)
        shared = beam_search(model, trie, batch, beams).score_BW
        ours = measure(call, size.repeats, 2)
        with tiled_keys_values(model):
            # Half precision: another order of sums over the context, three levels.
            check_same(shared, beam_search(model, trie, batch, beams).score_BW, 0.1)
            theirs = measure(call, size.repeats, 2)
        yield _milliseconds(f"latency_{beams}_beams_shared_keys", ours, theirs)


@contextlib.contextmanager
def tiled_keys_values(model: OneRec) -> Iterator[None]:
    """Cross-attention as libraries do it: each beam has a copy of the context's keys and values.

    They are copied once a request, when the beams fork, and then read by every level.
    """
    layers = [cast(Any, layer).cross_attention for layer in model.decoder]
    try:
        for attention in layers:
            attention.forward = _tiled(attention)
        yield
    finally:
        for attention in layers:
            del attention.forward


def _tiled(attention: Any) -> Callable[..., Tensor]:
    import torch.nn.functional as F

    copies: list[Tensor] = []

    def forward(x_BWD: Tensor, context: Any, mask: Tensor, causal: bool = False) -> Tensor:
        B, W, D = x_BWD.shape
        if W == 1:
            copies.clear()
        elif not copies:
            copies.extend(kv.repeat_interleave(W, 0) for kv in context)
        k, v = copies or context
        q = attention.queries(x_BWD.reshape(B * W, 1, D))
        rows = mask.repeat_interleave(W, 0)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=rows)
        return cast("Tensor", attention.out(mixed.transpose(1, 2).flatten(2))).view(B, W, D)

    return forward


def grouped_experts(device: str) -> Result:
    """A mixture's forward and backward pass: all experts at once against one by one."""
    import torch

    from components.training.onerec.experts import (
        all_experts_at_once,
        expert_by_expert,
        expert_hidden,
    )

    positions, width, experts, active = EXPERTS[device]
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        x = torch.randn(*shape, device=device, generator=generator) * shape[-1] ** -0.5
        return x.to(kind).requires_grad_()

    hidden = expert_hidden(width)
    x_MD, gate_up, down = (
        random(positions * active, width),
        random(experts, 2 * hidden, width),
        random(experts, width, hidden),
    )
    share = torch.rand(experts, generator=torch.Generator().manual_seed(0)).softmax(0)
    end_E = (share.cumsum(0) * len(x_MD)).round().int().to(device)

    def step(way: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y_MD = way(x_MD, gate_up, down, end_E)
        gradients = torch.autograd.grad((y_MD * y_MD).sum(), (x_MD, gate_up, down))
        if device == "cuda":
            torch.cuda.synchronize()
        return y_MD.detach(), *gradients

    for ours, theirs in zip(step(all_experts_at_once), step(expert_by_expert), strict=True):
        check_same(ours, theirs, 3e-2)
    grouped, one_by_one = (
        measure(lambda way=way: step(way), 10, 3)  # type: ignore[misc]
        for way in (all_experts_at_once, expert_by_expert)
    )
    return _milliseconds(f"step_{experts}_experts_{active}_active_grouped", grouped, one_by_one)


def check_same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Two ways give the same, or a speed would compare different work.

    Args:
        tolerance: largest difference, as a share of the largest value.

    Raises:
        AssertionError: they do not.
    """
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance * float(theirs.abs().max()):
        raise AssertionError(f"two ways differ by {difference:.3g}")


def _milliseconds(name: str, ours: Sample, theirs: Sample) -> Result:
    low, high = ours.low * 1e3, ours.high * 1e3
    return Result(name, ours.median * 1e3, theirs.median * 1e3, "ms", low, high, ours.n, False)


if __name__ == "__main__":
    print_lines(run(quick="--quick" in sys.argv))
