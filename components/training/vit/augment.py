"""Random changes of training images: tensor operations on a whole batch.

What an image looks like is a function of (seed, epoch, image) and of nothing else: not of the
batch it is in, of the worker that trains on it, or of what was drawn before. Its random numbers are
those of a SplitMix64 generator that begins at a hash of the three.

Shapes: B images of a batch, N of all data, J random numbers of an image, C colours, H height,
W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from components.data.hashing import splitmix64
from components.training.vit.data import Images, Normalisation

if TYPE_CHECKING:
    from components.training.vit.config import AugmentConfig

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]

#: Of an erased rectangle: share of the image, and height by width (arXiv 1708.04896).
ERASED_SHARE = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)

#: Which of an image's random numbers decides what; all exist whatever is switched on.
TOP, LEFT, FLIP, ERASE, SHARE, ASPECT, ERASED_TOP, ERASED_LEFT, PARTNER, BLEND = range(10)
DRAWS = 10

_STEP = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Views:
    """What a step trains on.

    Attributes:
        image_BCHW: float32, normalised.
        label_B: int64 classes.
        partner_B: int64 classes of what was mixed in; None: nothing was.
        share_B: float32 share of the image itself, at least one half.
    """

    image_BCHW: Tensor
    label_B: Tensor
    partner_B: Tensor | None = None
    share_B: Tensor | None = None


def draws(seed: int, epoch: int, index_B: Int64) -> Float64:
    """Random numbers of images in an epoch, uniform in [0, 1): float64 [B, J]."""
    key_B = np.full(len(index_B), seed, np.uint64)
    for part in (np.uint64(epoch), index_B.astype(np.uint64)):
        key_B = splitmix64(key_B) ^ part
    state_BJ = splitmix64(key_B)[:, None] + _STEP * np.arange(DRAWS, dtype=np.uint64)
    return (splitmix64(state_BJ) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def views(
    images: Images,
    index_B: Int64,
    normalisation: Normalisation,
    config: AugmentConfig,
    seed: int,
    epoch: int,
) -> Views:
    """Training images as an epoch sees them, on the device of the images.

    With ``mixup`` (arXiv 1710.09412) the partner is drawn from all images, not from the batch: an
    image's view stays its own. Where only a subset of the images may be trained on, mix nothing.
    """
    draw_BJ = draws(seed, epoch, index_B)
    image_BCHW = _changed(images, index_B, draw_BJ, normalisation, config)
    label_B = images.label_N[_on(images, index_B)]
    if not config.mixup:
        return Views(image_BCHW, label_B)
    partner_B = (draw_BJ[:, PARTNER] * len(images)).astype(np.int64)
    other_BCHW = _changed(images, partner_B, draws(seed, epoch, partner_B), normalisation, config)
    blend_B = betaincinv(config.mixup, config.mixup, draw_BJ[:, BLEND])
    share_B = _on(images, np.maximum(blend_B, 1 - blend_B).astype(np.float32))
    mixed_BCHW = torch.lerp(other_BCHW, image_BCHW, share_B[:, None, None, None])
    return Views(mixed_BCHW, label_B, images.label_N[_on(images, partner_B)], share_B)


def _on(images: Images, values_B: npt.NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values_B)).to(images.label_N.device)


def _changed(
    images: Images,
    index_B: Int64,
    draw_BJ: Float64,
    normalisation: Normalisation,
    config: AugmentConfig,
) -> Tensor:
    """Cut out, mirrored, normalised and erased: float32 [B, C, H, W]."""
    pixel_BCHW = images.pixel_NCHW[_on(images, index_B)]
    top_B, left_B = _up_to(2 * config.crop_padding, draw_BJ[:, [TOP, LEFT]]).T
    flip_B = draw_BJ[:, FLIP] < config.flip
    pixel_BCHW = crop(
        pixel_BCHW, config.crop_padding, *(_on(images, x) for x in (top_B, left_B, flip_B))
    )
    image_BCHW = normalisation.apply(pixel_BCHW)
    if not config.erasing:
        return image_BCHW
    H, W = image_BCHW.shape[2:]
    inside_BHW = _on(images, erased(draw_BJ, H, W, config.erasing))
    # The mean colour is 0 now.
    return image_BCHW.masked_fill(inside_BHW[:, None], 0.0)


def crop(pixel_BCHW: Tensor, padding: int, top_B: Tensor, left_B: Tensor, flip_B: Tensor) -> Tensor:
    """A window of each image's size in it with a black edge, mirrored where ``flip_B`` says so.

    Args:
        top_B, left_B: int64 first row and column of the window, 0 … 2 · padding.
    """
    B, C, H, W = pixel_BCHW.shape
    padded = F.pad(pixel_BCHW, (padding,) * 4)
    device = pixel_BCHW.device
    row_BH = top_B[:, None] + torch.arange(H, device=device)
    column_W = torch.arange(W, device=device)
    column_BW = left_B[:, None] + torch.where(flip_B[:, None], W - 1 - column_W, column_W)
    image_B111 = torch.arange(B, device=device)[:, None, None, None]
    colour_1C11 = torch.arange(C, device=device)[:, None, None]
    return padded[image_B111, colour_1C11, row_BH[:, None, :, None], column_BW[:, None, None]]


def erased(draw_BJ: Float64, H: int, W: int, probability: float) -> npt.NDArray[np.bool_]:
    """Where each image is erased: bool [B, H, W]; a rectangle too long for it is cut off."""
    low, high = ERASED_SHARE
    area_B = H * W * (low + (high - low) * draw_BJ[:, SHARE])
    thin, tall = np.log(ERASED_ASPECT)
    aspect_B = np.exp(thin + (tall - thin) * draw_BJ[:, ASPECT])
    height_B = np.rint(np.sqrt(area_B * aspect_B)).clip(1, H).astype(np.int64)
    width_B = np.rint(np.sqrt(area_B / aspect_B)).clip(1, W).astype(np.int64)
    top_B = _up_to(H - height_B, draw_BJ[:, ERASED_TOP])
    left_B = _up_to(W - width_B, draw_BJ[:, ERASED_LEFT])
    row_BH = _within(top_B, height_B, H) & (draw_BJ[:, ERASE] < probability)[:, None]
    return row_BH[:, :, None] & _within(left_B, width_B, W)[:, None, :]


def _within(start_B: Int64, length_B: Int64, size: int) -> npt.NDArray[np.bool_]:
    place = np.arange(size)
    return (place >= start_B[:, None]) & (place < (start_B + length_B)[:, None])


def _up_to(last: int | Int64, draw: Float64) -> Int64:
    """Integers 0 … last, equally likely."""
    return (draw * (last + 1)).astype(np.int64)
