"""Claims about the lazy decoder (after arXiv 2508.20900); what it shares, the model tests claim."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from components.training.onerec.config import LazyDecoderConfig, OneRecConfig
from components.training.onerec.lazy_decoder import (
    GroupedQueryAttention,
    LazyContext,
    LazyDecoderLayer,
)

CONFIG = OneRecConfig(
    architecture="lazy_decoder",
    lazy=LazyDecoderConfig(key_layers=2, key_heads=2, values="own"),
    d_model=32,
    heads=8,
    decoder_layers=6,
    dropout=0.0,
)


def with_lazy(**lazy: object) -> OneRecConfig:
    return CONFIG.model_copy(update={"lazy": CONFIG.lazy.model_copy(update=lazy)})


def norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def test_keys_are_normed_slices_of_one_product_and_values_have_slices_of_their_own() -> None:
    context, z = LazyContext(CONFIG), torch.randn(3, 7, 32)
    # S_kv · L_kv · G_kv · d_head
    assert context.project.weight.shape == (2 * 2 * 2 * 4, 32)
    slices = (z @ context.project.weight.T).split(2 * 4, -1)
    shared = context(z)
    for layer in range(6):
        group = layer // 3
        for kv, x in zip(shared[layer], slices[2 * group : 2 * group + 2], strict=True):
            assert kv.shape == (3, 2, 7, 4)
            assert torch.allclose(kv.transpose(1, 2).flatten(2), norm(x), atol=1e-5)


def test_values_are_the_keys_where_they_have_no_slice() -> None:
    config = with_lazy(values="keys")
    context = LazyContext(config)
    assert context.project.weight.shape == (1 * 2 * 2 * 4, 32)
    shared = context(torch.randn(3, 7, 32))
    assert all(keys is values for keys, values in shared)
    # Layers of a group share one tensor, and groups have their own.
    assert shared[0][0] is shared[2][0]
    assert not torch.equal(shared[2][0], shared[3][0])


def test_grouped_queries_equal_attention_to_repeated_keys() -> None:
    attention = GroupedQueryAttention(CONFIG)
    x, mask = torch.randn(3, 5, 32), torch.rand(3, 1, 1, 7) > 0.3
    keys, values = torch.randn(2, 3, 2, 7, 4)
    q = attention.query(x).unflatten(-1, (8, 4)).transpose(1, 2)
    repeated = (kv.repeat_interleave(4, 1) for kv in (keys, values))
    mixed = F.scaled_dot_product_attention(q, *repeated, attn_mask=mask)
    expected = attention.out(mixed.transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x, (keys, values), mask), expected, atol=1e-6)


def test_a_layer_projects_no_keys_of_the_context() -> None:
    layer = LazyDecoderLayer(CONFIG, 0)
    names = [name for name, _ in layer.cross_attention.named_parameters()]
    assert names == ["query.weight", "out.weight"]


def test_a_layer_reads_the_context_before_its_own_positions() -> None:
    layer = LazyDecoderLayer(CONFIG, 0)
    context = (torch.randn(1, 2, 7, 4), torch.randn(1, 2, 7, 4))
    mask = torch.ones(1, 1, 1, 7, dtype=torch.bool)
    x = torch.randn(1, 3, 32)
    after = x + layer.cross_attention(layer.cross_norm(x), context, mask)
    own = layer.self_norm(after)
    keys_values = layer.self_attention.keys_values(own)
    after = after + layer.self_attention(own, keys_values, causal=True)
    after = after + layer.ffn(layer.ffn_norm(after))
    assert torch.allclose(layer(x, context, mask), after, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"key_heads": 3}, "heads 8 is no multiple"), ({"key_layers": 4}, "decoder_layers 6 is no")],
)
def test_groups_that_do_not_come_out_even_are_refused_when_the_parameters_are_read(
    wrong: dict[str, int], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        OneRecConfig(**{**CONFIG.model_dump(), "lazy": wrong})
