"""Claims about signals, against gradients and formulas written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from components.curation.asp.signals import SIGNALS, Forward, signals_of

B, C, D = 17, 5, 8


@pytest.fixture
def forward() -> Forward:
    torch.manual_seed(0)
    return Forward(3 * torch.randn(B, C), torch.randint(0, C, (B,)), torch.randn(B, D))


def test_el2n_and_grand_are_norms_of_gradients_of_each_sample() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(D, C).double()
    feature_BD = torch.randn(B, D, dtype=torch.float64)
    target_B = torch.randint(0, C, (B,))

    def loss_of(weights: dict, bias_C: torch.Tensor, h_D: torch.Tensor, y: torch.Tensor):
        logits = functional_call(layer, weights, h_D[None]) + bias_C
        return torch.nn.functional.cross_entropy(logits, y[None])

    weights = {name: x.detach() for name, x in layer.named_parameters()}
    by_weights, by_logits = vmap(grad(loss_of, argnums=(0, 1)), in_dims=(None, None, 0, 0))(
        weights, torch.zeros(C, dtype=torch.float64), feature_BD, target_B
    )
    whole_B = sum(x.flatten(1).square().sum(1) for x in by_weights.values()).sqrt()
    found = signals_of(Forward(layer(feature_BD), target_B, feature_BD), ("el2n", "grand_last"))
    torch.testing.assert_close(found["el2n"].double(), by_logits.norm(dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["grand_last"].double(), whole_B, rtol=1e-5, atol=1e-6)


def test_signals_are_what_their_formulas_say(forward: Forward) -> None:
    found = {n: x.numpy() for n, x in signals_of(forward, tuple(SIGNALS)).items()}
    p_BC = forward.logit_BC.softmax(1).numpy()
    for b, y in enumerate(forward.target_B.tolist()):
        others = np.delete(p_BC[b], y)
        assert found["loss"][b] == pytest.approx(-np.log(p_BC[b, y]), rel=1e-5)
        assert found["entropy"][b] == pytest.approx(-(p_BC[b] @ np.log(p_BC[b])), rel=1e-4)
        assert found["margin"][b] == pytest.approx(1 - p_BC[b, y] + others.max(), rel=1e-4)
        assert forward.correct_B[b] == (p_BC[b].argmax() == y)
    assert found["el2n"].max() <= 2**0.5
    assert not any(x.requires_grad for x in signals_of(forward, ("loss",)).values())


def test_a_binary_model_is_one_of_two_classes() -> None:
    logit_B = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    forward = Forward.binary(logit_B, torch.tensor([1.0, 1.0, 0.0]))
    found = signals_of(forward, ("loss", "el2n"))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logit_B, torch.tensor([1.0, 1.0, 0.0]), reduction="none"
    )
    torch.testing.assert_close(found["loss"], expected.detach())
    wrong_B = (logit_B.sigmoid() - torch.tensor([1.0, 1.0, 0.0])).abs().detach()
    torch.testing.assert_close(found["el2n"], 2**0.5 * wrong_B)
    assert forward.correct_B.tolist() == [True, False, False]


def test_grand_without_features_says_what_it_needs(forward: Forward) -> None:
    with pytest.raises(ValueError, match=r"grand_last.*features"):
        signals_of(Forward(forward.logit_BC, forward.target_B), ("grand_last",))
