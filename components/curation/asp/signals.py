"""What the training forward pass tells of each sample, without a second pass.

A signal is a function of a `Forward`; another one joins by `SIGNALS`. All are at least 0, larger
where there is more to learn, and computed without gradients.

Shapes: B samples of a batch, C classes, D width of the features before the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Forward:
    """The outputs of a classifier for a batch.

    Attributes:
        logit_BC: float; of a binary model [B, 2], its logits being 0 and its own (`binary`).
        target_B: int64 classes.
        feature_BD: what the last layer reads; None where no signal asks for it.
    """

    logit_BC: Tensor
    target_B: Tensor
    feature_BD: Tensor | None = None

    @classmethod
    def binary(cls, logit_B: Tensor, target_B: Tensor, feature_BD: Tensor | None = None) -> Forward:
        """Of a model with one logit, that of the class 1."""
        logit_BC = torch.stack([torch.zeros_like(logit_B), logit_B], 1)
        return cls(logit_BC, target_B.long(), feature_BD)

    @classmethod
    def joined(cls, parts: Sequence[Forward]) -> Forward:
        """Of several batches, one after the other."""
        features = [part.feature_BD for part in parts if part.feature_BD is not None]
        return cls(
            torch.cat([part.logit_BC for part in parts]),
            torch.cat([part.target_B for part in parts]),
            torch.cat(features) if features else None,
        )

    @property
    def detached(self) -> Forward:
        """The same without what made it."""
        feature_BD = None if self.feature_BD is None else self.feature_BD.detach()
        return Forward(self.logit_BC.detach(), self.target_B, feature_BD)

    @property
    def correct_B(self) -> Tensor:
        """bool: the most probable class is the target."""
        return self.logit_BC.argmax(1) == self.target_B


def loss(forward: Forward) -> Tensor:
    """Cross-entropy ``-log p_y``."""
    return F.cross_entropy(forward.logit_BC, forward.target_B, reduction="none")


def el2n(forward: Forward) -> Tensor:
    """``‖p - onehot(y)‖₂``, from 0 to √2 (arXiv 2107.07075)."""
    return _error(forward).norm(dim=1)


def grand_last(forward: Forward) -> Tensor:
    """``‖p - onehot(y)‖ √(‖h‖² + 1)``: norm of the gradient of the last layer, biases too."""
    if forward.feature_BD is None:
        raise ValueError("signal 'grand_last' needs the features that the last layer reads")
    return _error(forward).norm(dim=1) * (forward.feature_BD.float().square().sum(1) + 1).sqrt()


def entropy(forward: Forward) -> Tensor:
    """``-Σ p log p``."""
    log_p_BC = forward.logit_BC.log_softmax(1)
    return -(log_p_BC.exp() * log_p_BC).sum(1)


def margin(forward: Forward) -> Tensor:
    """``1 - (p_y - max of the others)``, from 0 to 2."""
    p_BC = forward.logit_BC.softmax(1)
    target_B1 = forward.target_B[:, None]
    own_B = p_BC.gather(1, target_B1)[:, 0]
    other_B = p_BC.scatter(1, target_B1, -torch.inf).amax(1)
    return (1 - (own_B - other_B)).clamp(0, 2)


#: Whatever a rule may ask for. ``forgetting`` is counted from ``correct_B`` by who keeps the state.
SIGNALS: Mapping[str, Callable[[Forward], Tensor]] = {
    "loss": loss,
    "el2n": el2n,
    "grand_last": grand_last,
    "entropy": entropy,
    "margin": margin,
}


@torch.no_grad()
def signals_of(forward: Forward, names: Sequence[str]) -> dict[str, Tensor]:
    """Each signal of every sample: float32 [B]."""
    whole = Forward(forward.logit_BC.float(), forward.target_B, forward.feature_BD)
    return {name: SIGNALS[name](whole) for name in names}


def _error(forward: Forward) -> Tensor:
    """Gradient of the loss by the logits: ``p - onehot(y)``, [B, C]."""
    p_BC = forward.logit_BC.softmax(1)
    return p_BC - F.one_hot(forward.target_B, p_BC.shape[1])
