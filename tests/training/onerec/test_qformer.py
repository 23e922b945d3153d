"""The query transformer against attention written out, and what padding may do."""

from __future__ import annotations

import math

import torch
from torch import nn

from components.training.onerec.qformer import QFormer, QFormerBlock


def make(residual: bool = True, blocks: int = 2) -> QFormer:
    torch.manual_seed(0)
    return QFormer(
        queries=3, width=8, states=6, blocks=blocks, heads=2, ffn=16, residual=residual
    ).eval()


def written_out(block: QFormerBlock, query_qD: torch.Tensor, state_SD: torch.Tensor):
    """One block by loops over heads and the definition of attention."""
    width, heads = query_qD.shape[1], block.heads
    normed = block.query_norm(query_qD)
    q, kv = normed @ block.query.weight.T, state_SD @ block.key_value.weight.T
    k, v = kv[:, :width], kv[:, width:]
    mixed = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        weight = (q[:, part] @ k[:, part].T / math.sqrt(width / heads)).softmax(-1)
        mixed.append(weight @ v[:, part])
    x = torch.cat(mixed, 1) @ block.out.weight.T
    x = query_qD + x if block.residual else x
    after = block.ffn(nn.functional.rms_norm(x, (width,), block.ffn_norm.weight))
    return x + after if block.residual else after


def test_a_block_is_attention_as_it_is_defined() -> None:
    for residual in (True, False):
        model = make(residual)
        state = torch.randn(1, 5, 6)
        expected = model.query
        for block in model.blocks:
            assert isinstance(block, QFormerBlock)
            expected = written_out(block, expected, state[0])
        torch.testing.assert_close(model(state)[0], expected, atol=1e-6, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    model, state = make(), torch.randn(4, 5, 6)
    padded = torch.cat([state, 1e3 * torch.randn(4, 3, 6)], 1)
    mask = torch.arange(8).expand(4, -1) < 5
    torch.testing.assert_close(model(padded, mask), model(state))


def test_the_order_of_states_does_not_matter_but_each_query_is_another() -> None:
    model, state = make(), torch.randn(2, 5, 6)
    out = model(state)
    torch.testing.assert_close(model(state[:, torch.tensor([3, 1, 4, 0, 2])]), out)
    assert (out[:, 0] - out[:, 1]).abs().max() > 1e-3
