"""How well a model classifies images: figures of all, of each class, and of each image.

Shapes: N images, n of a worker, B of a batch, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.training.vit.data import Images, Normalisation

BATCH_SIZE = 256
TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """What a model made of images.

    Attributes:
        loss_N: float32 cross-entropy of each image, nats.
        rank_N: int64 place of its class among the scores, 1: the highest. Equal scores come before
            it, and where scores are not numbers it has none, 0: neither a constant nor a diverged
            model is right.
        label_N: int64 its class.
        classes: K.
    """

    loss_N: Tensor
    rank_N: Tensor
    label_N: Tensor
    classes: int

    @property
    def correct_N(self) -> Tensor:
        """bool: what paired comparisons of two models are made of."""
        return self.rank_N == 1

    @property
    def loss(self) -> float:
        return float(self.loss_N.double().mean())

    @property
    def top1(self) -> float:
        """Share of the images whose class has the highest score."""
        return float(self.correct_N.double().mean())

    @property
    def top5(self) -> float:
        """Share of the images whose class is among the five highest scores."""
        return float(((self.rank_N >= 1) & (self.rank_N <= TOP)).double().mean())

    @property
    def by_class_K(self) -> Tensor:
        """Share of the images of each class that are right: float64, NaN where it has none."""
        count_K = torch.bincount(self.label_N, minlength=self.classes)
        right_K = torch.bincount(self.label_N[self.correct_N], minlength=self.classes)
        return right_K.double() / count_K

    @property
    def balanced(self) -> float:
        """Mean of the shares of those classes that have images."""
        return float(self.by_class_K.nanmean())

    def metrics(self) -> dict[str, float]:
        """Figures of a validation."""
        return {
            "valid_loss": self.loss,
            "valid_top1": self.top1,
            "valid_top5": self.top5,
            "valid_balanced_accuracy": self.balanced,
        }


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: Images,
    normalisation: Normalisation,
    rank: int = 0,
    world_size: int = 1,
) -> Evaluation:
    """Classify unchanged images, on the model's device; workers share them and all have the result.

    Args:
        model: gives logits [B, K] of normalised images; left in the mode of evaluation.
    """
    model.eval()
    device = next(model.parameters()).device
    share_n = torch.arange(rank, len(images), world_size, device=images.label_N.device)
    # Whose image another worker has, it adds nothing to.
    found_2N = torch.zeros(2, len(images), dtype=torch.float64, device=device)
    classes = 0
    for index_B in share_n.split(BATCH_SIZE):
        image_BCHW = normalisation.apply(images.pixel_NCHW[index_B].to(device))
        label_B = images.label_N[index_B].to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logit_BK = cast(Tensor, model(image_BCHW)).float()
        own_B1 = logit_BK.gather(1, label_B[:, None])
        loss_B = F.cross_entropy(logit_BK, label_B, reduction="none")
        # The class counts itself; nothing is as good as a score that is not a number.
        rank_B = (logit_BK >= own_B1).sum(1)
        found_2N[:, index_B.to(device)] = torch.stack([loss_B, rank_B]).double()
        classes = logit_BK.shape[1]
    if world_size > 1:
        torch.distributed.all_reduce(found_2N)
    loss_N, rank_N = found_2N.cpu()
    return Evaluation(loss_N.float(), rank_N.long(), images.label_N.cpu(), classes)
