"""Claims about the mixture of experts (arXiv 2506.13695, section 2.3)."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components.training.onerec.attention import feed_forward
from components.training.onerec.config import OneRecConfig
from components.training.onerec.encoder import EncoderLayer
from components.training.onerec.experts import (
    MixtureOfExperts,
    all_experts_at_once,
    balance_experts,
    expert_by_expert,
    expert_hidden,
    has_experts,
)
from components.training.onerec.model import OneRec

CONFIG = OneRecConfig(d_model=32, experts=6, active_experts=2, dropout=0.0)


def mixture(seed: int = 0, **changes: object) -> MixtureOfExperts:
    torch.manual_seed(seed)
    moe = MixtureOfExperts(CONFIG.model_copy(update=changes))
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moe


def expert(moe: MixtureOfExperts, e: int, x: Tensor) -> Tensor:
    """SwiGLU by the formula."""
    gate, up = (x @ moe.gate_up[e].T).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ moe.down[e].T


def by_formula(moe: MixtureOfExperts, x_ND: Tensor) -> Tensor:
    """Position after position: the k largest of affinity + bias, weighed by affinity alone."""
    rows = []
    for x in x_ND:
        affinity = torch.sigmoid(moe.router @ x).detach()
        order = sorted(range(len(moe.router)), key=lambda e: -float(affinity[e] + moe.bias_E[e]))
        chosen = order[: moe.active]
        total = sum(affinity[e] for e in chosen)
        rows.append(sum((affinity[e] / total) * expert(moe, e, x) for e in chosen))
    return torch.stack([cast(Tensor, row) for row in rows])


def test_it_is_the_formula_whatever_the_bias() -> None:
    x = torch.randn(40, 32)
    for seed in range(2):
        moe = mixture(seed)
        moe.bias_E.normal_(std=0.5)
        assert torch.allclose(moe(x[None])[0], by_formula(moe, x), atol=1e-5)


def test_all_experts_with_an_equal_router_are_the_dense_mixture() -> None:
    moe = mixture(active_experts=6)
    nn.init.zeros_(moe.router)
    x = torch.randn(2, 7, 32)
    dense = torch.stack([expert(moe, e, x) for e in range(6)]).mean(0)
    assert torch.allclose(moe(x), dense, atol=1e-5)


def test_identical_experts_are_one_feed_forward_however_they_are_chosen() -> None:
    moe = mixture()
    with torch.no_grad():
        for weight in (moe.gate_up, moe.down):
            weight.copy_(weight[:1].expand_as(weight))
    x = torch.randn(3, 5, 32)
    assert torch.allclose(moe(x), expert(moe, 0, x), atol=1e-5)


def test_it_equals_the_sparse_block_of_mixtral_with_the_same_weights() -> None:
    pytest.importorskip("transformers")
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    moe = mixture(gating="softmax")
    size = {"hidden_size": 32, "intermediate_size": expert_hidden(32)}
    block = MixtralSparseMoeBlock(
        MixtralConfig(num_local_experts=6, num_experts_per_tok=2, **size)
    ).eval()
    with torch.no_grad():
        block.gate.weight.copy_(moe.router)
        block.experts.gate_up_proj.copy_(moe.gate_up)
        block.experts.down_proj.copy_(moe.down)
    x = torch.randn(4, 9, 32, requires_grad=True)
    ours, theirs = moe(x), block(x)
    assert torch.allclose(ours, theirs, atol=1e-5)
    (grad,) = torch.autograd.grad(ours.square().sum(), x)
    (expected,) = torch.autograd.grad(theirs.square().sum(), x)
    assert torch.allclose(grad, expected, atol=1e-4)


def test_gates_sum_to_one_and_the_bias_never_weighs() -> None:
    moe, x = mixture(), torch.randn(50, 32)
    chosen, gates = moe.route(x)
    assert torch.allclose(gates.sum(-1), torch.ones(50))
    moe.bias_E += 0.7  # as much for every expert: nobody else is chosen, nothing weighs more
    again, same = moe.route(x)
    assert torch.equal(chosen, again)
    assert torch.equal(gates, same)
    moe.bias_E[3] = 10.0
    forced, gates = moe.route(x)
    assert (forced == 3).any(-1).all()
    affinity = torch.sigmoid(x @ moe.router.T).gather(1, forced)
    assert torch.allclose(gates, affinity / affinity.sum(-1, keepdim=True), atol=1e-6)


def test_gradient_reaches_router_and_experts_but_never_the_bias() -> None:
    moe = mixture()
    assert "bias_E" in dict(moe.named_buffers())
    assert "bias_E" in moe.state_dict()
    assert not moe.bias_E.requires_grad
    moe(torch.randn(2, 60, 32)).square().sum().backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).all(), name


def test_a_position_does_not_depend_on_its_place_or_its_neighbours() -> None:
    moe, x = mixture(), torch.randn(64, 32)
    order = torch.randperm(64)
    whole = moe(x[None])[0]
    assert torch.allclose(moe(x[order][None])[0], whole[order], atol=1e-6)
    assert torch.allclose(moe(x[5:6][None])[0], whole[5:6], atol=1e-6)


def test_grouped_products_equal_expert_by_expert_also_where_some_have_no_position() -> None:
    """The grouped path of GPUs, run by its CPU kernel: values and gradients."""
    moe = mixture()
    end = torch.tensor([3, 3, 20, 20, 21, 30], dtype=torch.int32)
    x = torch.randn(30, 32)
    weight = torch.randn(30, 32)
    outcomes = []
    for way in (expert_by_expert, all_experts_at_once):
        leaf = x.clone().requires_grad_()
        y = way(leaf, moe.gate_up, moe.down, end)
        grads = torch.autograd.grad((y * weight).sum(), (leaf, moe.gate_up, moe.down))
        outcomes.append((y, *grads))
    for ours, theirs in zip(*outcomes, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert (outcomes[0][2][[1, 3]] == 0).all()


def flops(moe: MixtureOfExperts, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        moe(x)
    return counter.get_total_flops()


def test_cost_follows_active_experts_and_not_how_many_there_are() -> None:
    x, hidden = torch.randn(8, 16, 32), expert_hidden(32)
    positions = 8 * 16
    for experts in (4, 16, 64):
        for active in (1, 2, 4):
            moe = mixture(experts=experts, active_experts=active)
            products = 2 * positions * active * 3 * 32 * hidden
            router = 2 * positions * 32 * experts
            assert flops(moe, x) == products + router


def skewed(step: int) -> Tensor:
    """Most positions look alike, so an unbalanced router sends them to the same experts."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(1, 256, 32, generator=generator)
    centre = torch.randn(32, generator=torch.Generator().manual_seed(99))
    return 0.5 * noise + 1.5 * centre


def test_a_skewed_stream_is_spread_evenly_by_the_bias_alone() -> None:
    moe = mixture().train()
    loads = []
    for step in range(400):
        moe(skewed(step))
        loads.append(float(moe.balance(5e-3)))
    assert loads[0] > 2.5
    assert sum(loads[-20:]) / 20 < 1.25
    unbalanced = mixture().train()
    for step in range(3):
        unbalanced(skewed(step))
        assert float(unbalanced.balance(0.0)) > 2.5
    assert (unbalanced.bias_E == 0).all()


def test_one_step_of_the_balance_is_the_formula() -> None:
    moe = mixture().train()
    x = torch.randn(1, 30, 32)
    moe(x)
    load = torch.bincount(moe.route(x[0])[0].flatten(), minlength=6).float()
    assert torch.equal(moe.load_E, load)
    assert load.sum() == 60
    ratio = moe.balance(1e-3)
    assert float(ratio) == pytest.approx(float(load.max() / load.mean()))
    assert torch.allclose(moe.bias_E, 1e-3 * torch.sign(load.mean() - load))
    assert (moe.load_E == 0).all()


def test_evaluation_neither_counts_nor_moves_the_bias() -> None:
    moe = mixture().eval()
    before = moe.state_dict()["bias_E"].clone()
    moe(torch.randn(2, 20, 32))
    assert (moe.load_E == 0).all()
    assert torch.equal(moe.bias_E, before)


def test_padding_of_the_encoder_is_counted_in_no_load() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(CONFIG.model_copy(update={"moe_in": "both", "encoder_layers": 1}), 0)
    assert isinstance(layer.ffn, MixtureOfExperts)
    short_BSD = torch.randn(3, 4, 32)
    layer(short_BSD, None)
    alone_E = layer.ffn.load_E.clone()
    layer.ffn.load_E.zero_()
    padded_BSD = torch.cat([short_BSD, torch.randn(3, 5, 32)], 1)
    real_BS = torch.arange(9).expand(3, -1) < 4
    layer(padded_BSD, real_BS[:, None, None])
    assert alone_E.sum() == 3 * 4 * CONFIG.active_experts
    assert layer.ffn.load_E.equal(alone_E)


def test_a_step_without_a_position_moves_no_bias() -> None:
    moe = mixture()
    assert moe.balance(0.1) == 1
    assert not moe.bias_E.any()


def test_half_precision_chooses_as_full_precision_and_differs_by_rounding() -> None:
    moe, x = mixture().eval(), torch.randn(4, 16, 32)
    exact = moe(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        chosen, gates = moe.route(x.flatten(0, 1))
        rough = moe(x).detach()
    assert gates.dtype == torch.float32
    assert torch.equal(chosen, moe.route(x.flatten(0, 1))[0])
    # Three products with eight bits of mantissa each.
    assert float((rough.float() - exact).abs().max() / exact.abs().max()) < 3 * 2**-7


@pytest.mark.parametrize(("d_model", "hidden"), [(1024, 2816), (128, 384), (32, 128)])
def test_hidden_width_is_two_thirds_of_four_widths_rounded_up(d_model: int, hidden: int) -> None:
    assert expert_hidden(d_model) == hidden
    assert hidden == math.ceil(8 * d_model / 3 / 128) * 128


def test_mixtures_are_where_the_configuration_says() -> None:
    def where(**changes: object) -> tuple[list[bool], list[bool]]:
        size = {"encoder_layers": 4, "decoder_layers": 4, "experts": 4, **changes}
        model = OneRec(CONFIG.model_copy(update=size))
        encoder = [isinstance(layer.ffn, MixtureOfExperts) for layer in model.encoder]
        return encoder, [isinstance(layer.ffn, MixtureOfExperts) for layer in model.decoder]

    none, every, second = [False] * 4, [True] * 4, [False, True, False, True]
    assert where() == (none, every)
    assert where(moe_in="both") == (every, every)
    assert where(moe_in="both", moe_every=2) == (second, second)
    assert where(experts=0) == (none, none)


def test_experts_start_at_the_size_of_dense_weights() -> None:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"d_model": 128, "encoder_layers": 1, "decoder_layers": 1})
    moe = OneRec(config).decoder[0].ffn
    assert isinstance(moe, MixtureOfExperts)
    usual = 0.02 * math.sqrt(1024 / 128)
    assert float(moe.gate_up.detach().std()) == pytest.approx(usual, rel=0.05)
    assert float(moe.router.detach().std()) == pytest.approx(usual, rel=0.15)
    narrower = 0.02 * math.sqrt(1024 / expert_hidden(128)) / math.sqrt(2 * 2)
    assert float(moe.down.detach().std()) == pytest.approx(narrower, rel=0.05)


def test_a_model_without_experts_has_nothing_to_balance() -> None:
    dense = CONFIG.model_copy(update={"experts": 0})
    assert balance_experts(OneRec(dense), 1e-3) is None
    assert not has_experts(dense, "decoder", 0)
    assert isinstance(EncoderLayer(dense, 0).ffn, nn.Sequential)
    assert isinstance(feed_forward(CONFIG, "decoder", 0), MixtureOfExperts)


def test_more_active_experts_than_there_are_is_refused_when_the_parameters_are_read() -> None:
    with pytest.raises(ValueError, match="active_experts 3 is more than experts 2"):
        OneRecConfig(experts=2, active_experts=3)


def test_a_dense_feed_forward_has_two_matrices_and_an_expert_three() -> None:
    dense = feed_forward(CONFIG.model_copy(update={"experts": 0}), "decoder", 0)
    assert sum(p.numel() for p in dense.parameters()) == 2 * 32 * CONFIG.ffn
    moe = mixture()
    assert moe.gate_up[0].numel() + moe.down[0].numel() == 3 * 32 * expert_hidden(32)
    assert F.silu(torch.tensor(1.0)) == pytest.approx(1 / (1 + math.exp(-1)))
