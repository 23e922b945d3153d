"""Claims about figures of a model: against other libraries, and of models that know nothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, recall_score, top_k_accuracy_score
from torch import Tensor, nn
from vit_world import TINY, digits

from components.training.vit.data import Normalisation
from components.training.vit.evaluate import Evaluation, evaluate
from components.training.vit.model import Vit

NORMALISATION = Normalisation.of(digits())


@pytest.fixture(scope="module")
def model() -> Vit:
    torch.manual_seed(0)
    model = Vit(TINY)
    nn.init.normal_(model.head.weight)
    return model


def logits(model: Vit) -> Tensor:
    with torch.no_grad():
        return model.eval()(NORMALISATION.apply(digits().pixel_NCHW))


def test_figures_are_those_of_scikit_learn(model: Vit) -> None:
    found = evaluate(model, digits(), NORMALISATION)
    label, score = digits().label_N.numpy(), logits(model)
    guess = score.argmax(1).numpy()
    assert found.top1 == pytest.approx((guess == label).mean())
    assert found.top5 == pytest.approx(top_k_accuracy_score(label, score.numpy(), k=5))
    assert found.balanced == pytest.approx(balanced_accuracy_score(label, guess))
    assert found.by_class_K.tolist() == pytest.approx(recall_score(label, guess, average=None))
    assert found.loss == pytest.approx(float(F.cross_entropy(score, digits().label_N)), rel=1e-6)
    assert 0 < found.top1 < found.top5 < 1


def test_each_image_has_its_own_result(model: Vit) -> None:
    found = evaluate(model, digits(), NORMALISATION)
    score_NK, label_N = logits(model), digits().label_N
    assert torch.equal(found.correct_N, score_NK.argmax(1) == label_N)
    torch.testing.assert_close(found.loss_N, F.cross_entropy(score_NK, label_N, reduction="none"))
    some = torch.randperm(300, generator=torch.Generator().manual_seed(0)).numpy()
    again = evaluate(model, digits().take(some), NORMALISATION)
    assert torch.equal(again.correct_N, found.correct_N[some])
    torch.testing.assert_close(again.loss_N, found.loss_N[some])


def test_a_model_that_knows_nothing_is_not_right(model: Vit) -> None:
    blind = Vit(TINY)
    for value in (0.0, math.nan):
        nn.init.constant_(blind.head.weight, value)
        found = evaluate(blind, digits(), NORMALISATION)
        assert found.top1 == found.top5 == found.balanced == 0


def test_classes_without_images_do_not_count() -> None:
    rank_N, label_N = torch.tensor([1, 2, 1, 6]), torch.tensor([0, 0, 2, 2])
    found = Evaluation(torch.zeros(4), rank_N, label_N, 7)
    assert found.balanced == 0.5
    assert found.by_class_K[:3].nan_to_num(-1).tolist() == [0.5, -1, 0.5]
    assert found.top5 == 0.75
    rare = Evaluation(torch.zeros(4), torch.tensor([1, 1, 1, 2]), torch.tensor([0, 0, 0, 1]), 2)
    assert (rare.top1, rare.balanced) == (0.75, 0.5)
