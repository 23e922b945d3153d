"""The architecture and the loss of SASRec against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.training.sasrec.config import SasrecConfig
from components.training.sasrec.model import Sasrec, full_softmax_loss

N, L = 23, 9


def make_model(**config: object) -> Sasrec:
    torch.manual_seed(0)
    model = Sasrec(SasrecConfig(num_items=N, width=16, max_length=L, **config))
    for parameter in model.parameters():  # away from the near-zero start, so that all paths count
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_events(seed: int = 1, batch: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(0, N, (batch, L), generator=generator)
    return items, torch.rand(batch, L, generator=generator) < 0.5


def test_later_events_do_not_change_earlier_states() -> None:
    model, (items, positive) = make_model(), make_events()
    changed, flags = items.clone(), positive.clone()
    changed[:, 5:], flags[:, 5:] = (items[:, 5:] + 1) % N, ~positive[:, 5:]
    before, after = model(items, positive), model(changed, flags)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().min(dim=-1).values.max() > 1e-3


def test_padding_and_batch_size_change_no_score() -> None:
    model, (items, positive) = make_model(), make_events()
    length = torch.tensor([1, 3, 4, 9, 2, 7])
    together = model.last_scores(items, positive, length)
    for row, size in enumerate(length.tolist()):
        alone = model.last_scores(
            items[row : row + 1, :size], positive[row : row + 1, :size], torch.tensor([size])
        )
        torch.testing.assert_close(together[row : row + 1], alone)


def test_order_of_events_and_their_feedback_matter() -> None:
    model, (items, positive) = make_model(), make_events()
    length = torch.full((len(items),), L)
    scores = model.last_scores(items, positive, length)
    assert not torch.allclose(scores, model.last_scores(items.flip(1), positive.flip(1), length))
    assert not torch.allclose(scores, model.last_scores(items, ~positive, length))


def test_tied_model_scores_by_its_input_embeddings() -> None:
    tied, untied = make_model(tied=True), make_model(tied=False)
    assert tied.output_weight is tied.item.weight
    assert untied.output_weight is not untied.item.weight
    count = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert count == untied.item.weight.numel()


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_loss_and_gradients_equal_cross_entropy_in_any_chunks(rows: int) -> None:
    generator = torch.Generator().manual_seed(3)
    # float64, so that the tolerance need not hide an error of the gradient
    state = torch.randn(17, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(N, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, N, (17,), generator=generator)
    loss = full_softmax_loss(state, weight, target, logits_bytes=rows * 4 * N)
    ours = torch.autograd.grad(3 * loss, (state, weight))
    expected = F.cross_entropy(state @ weight.T, target)
    torch.testing.assert_close(loss, expected)
    theirs = torch.autograd.grad(3 * expected, (state, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_is_finite_where_the_target_is_hopeless() -> None:
    state = torch.tensor([[1000.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = full_softmax_loss(state, weight, torch.tensor([1]))
    assert torch.isfinite(loss)
    assert torch.autograd.grad(loss, state)[0].item() == pytest.approx(2.0)
