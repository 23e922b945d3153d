"""Claims about views of training images: whose they are, what they show, how often."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from vit_world import digits

from components.training.vit.augment import DRAWS, Views, crop, draws, erased, views
from components.training.vit.config import AugmentConfig
from components.training.vit.data import Images, Normalisation

ALL = AugmentConfig(crop_padding=2, flip=0.5, erasing=0.5, mixup=0.8)
NONE = AugmentConfig(crop_padding=0, flip=0, erasing=0, mixup=0)
RAW = Normalisation((0.0,) * 3, (1 / 255,) * 3)


def see(index: list[int] | np.ndarray, config: AugmentConfig = ALL, epoch: int = 1) -> Views:
    return views(digits(), np.asarray(index), Normalisation.of(digits()), config, 5, epoch)


def test_a_view_depends_on_epoch_and_image_alone() -> None:
    index = np.arange(40)
    whole = see(index)
    assert whole.share_B is not None
    assert whole.partner_B is not None
    for part in (index[::-1], index[7:9], index[1::2], np.array([3])):
        some = see(part)
        assert some.share_B is not None
        assert some.partner_B is not None
        assert torch.equal(some.image_BCHW, whole.image_BCHW[part.copy()])
        assert torch.equal(some.label_B, whole.label_B[part.copy()])
        assert torch.equal(some.partner_B, whole.partner_B[part.copy()])
        assert torch.equal(some.share_B, whole.share_B[part.copy()])
    torch.rand(3)
    np.random.default_rng().random()
    assert torch.equal(see(index).image_BCHW, whole.image_BCHW)
    differs_B = (see(index, epoch=2).image_BCHW != whole.image_BCHW).flatten(1).any(1)
    assert differs_B.all()


def test_nobody_elses_random_numbers_are_touched() -> None:
    before = torch.random.get_rng_state()
    see([1, 2, 3])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_augmentation_images_are_as_they_are() -> None:
    seen = see([4, 0], NONE)
    assert torch.equal(
        seen.image_BCHW, Normalisation.of(digits()).apply(digits().pixel_NCHW[[4, 0]])
    )
    assert seen.label_B.tolist() == [4, 0]
    assert seen.partner_B is None


def test_random_numbers_are_even_and_of_their_own() -> None:
    u_BJ = draws(3, 7, np.arange(20_000))
    assert u_BJ.shape == (20_000, DRAWS)
    assert u_BJ.min() >= 0
    assert u_BJ.max() < 1
    # A chi-square of 19 degrees of freedom exceeds 52 with probability 1e-4; there are ten.
    for u_B in u_BJ.T:
        count = np.histogram(u_B, 20, (0, 1))[0]
        assert ((count - 1000) ** 2 / 1000).sum() < 52
    # Between kinds, neighbours, epochs and seeds: correlations of 20,000 pairs, 4.5 deviations.
    others = [draws(3, 8, np.arange(20_000)), draws(4, 7, np.arange(20_000)), u_BJ[1:]]
    for other in others:
        size = len(other)
        for a, b in zip(u_BJ[:size].T, other.T, strict=True):
            assert abs(np.corrcoef(a, b)[0, 1]) < 4.5 / size**0.5
    within = np.corrcoef(u_BJ.T) - np.eye(DRAWS)
    assert np.abs(within).max() < 4.5 / 20_000**0.5
    assert len(np.unique(u_BJ)) == u_BJ.size


def test_a_window_is_cut_out_of_the_padded_image() -> None:
    pixel_BCHW = torch.arange(2 * 3 * 5 * 5, dtype=torch.uint8).view(2, 3, 5, 5)
    padded = F.pad(pixel_BCHW, (2, 2, 2, 2))
    for top, left, flip in itertools.product(range(5), range(5), (False, True)):
        window = padded[:, :, top : top + 5, left : left + 5]
        expected = window.flip(3) if flip else window
        both = [torch.tensor([x, x]) for x in (top, left, flip)]
        cut = crop(pixel_BCHW, 2, both[0], both[1], both[2])
        assert torch.equal(cut, expected), (top, left, flip)


def test_windows_and_mirrors_are_equally_likely() -> None:
    """An image of nothing but its middle pixel shows where its window was."""
    pixel_NCHW = torch.zeros(9000, 3, 5, 5, dtype=torch.uint8)
    pixel_NCHW[:, :, 2, 1] = 255
    images = Images(pixel_NCHW, torch.zeros(9000, dtype=torch.int64), [""] * 9000)
    config = AugmentConfig(crop_padding=1, flip=0.5)
    seen = views(images, np.arange(9000), RAW, config, 0, 1).image_BCHW[:, 0]
    row, column = seen.flatten(1).argmax(1).div(5, rounding_mode="floor"), seen.sum(1).argmax(1)
    # A dot in column 1 comes to columns 0 to 2, or mirrored to 2 to 4: 2 is twice as likely.
    table = torch.zeros(3, 5)
    for r, c in zip((row - 1).tolist(), column.tolist(), strict=True):
        table[r, c] += 1
    expected = 9000 / 18 * torch.tensor([1, 1, 2, 1, 1]).expand(3, 5)
    # A chi-square of 14 degrees of freedom exceeds 45 with probability below 1e-4.
    assert ((table - expected) ** 2 / expected).sum() < 45


def test_rectangles_are_erased_as_often_and_as_large_as_asked_for() -> None:
    draw_BJ = draws(0, 1, np.arange(8000))
    inside_BHW = erased(draw_BJ, 32, 32, 0.25)
    is_erased_B = inside_BHW.any((1, 2))
    # Four standard errors of a share of 8,000.
    assert is_erased_B.mean() == pytest.approx(0.25, abs=0.02)
    share_B = inside_BHW.mean((1, 2))[is_erased_B]
    assert share_B.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    # Whole pixels of small rectangles; long ones are cut off.
    assert share_B.max() < 0.36
    for inside_HW in inside_BHW[is_erased_B][:50]:
        rows, columns = inside_HW.any(1), inside_HW.any(0)
        assert np.array_equal(inside_HW, rows[:, None] & columns)
        for line in (rows, columns):
            first, last = np.flatnonzero(line)[[0, -1]]
            assert line[first : last + 1].all()
    touched_HW = inside_BHW.mean(0)
    assert touched_HW.min() > 0


def test_what_is_erased_has_the_mean_colour() -> None:
    config = NONE.model_copy(update={"erasing": 1.0})
    seen, plain = see(np.arange(50), config).image_BCHW, see(np.arange(50), NONE).image_BCHW
    inside_BHW = torch.from_numpy(erased(draws(5, 1, np.arange(50)), 8, 8, 1.0))
    outside = ~inside_BHW[:, None].expand_as(seen)
    assert torch.equal(seen[outside], plain[outside])
    assert not seen[~outside].any()


def test_a_mixed_image_keeps_at_least_half_of_itself() -> None:
    index, changed = np.arange(200), AugmentConfig(crop_padding=2, flip=0.5, erasing=0.5)
    seen = see(index, changed.model_copy(update={"mixup": 0.8}))
    assert seen.share_B is not None
    assert seen.partner_B is not None
    assert seen.share_B.min() >= 0.5
    assert seen.share_B.max() <= 1
    assert seen.label_B.tolist() == digits().label_N[:200].tolist()
    # The mixture is on the way from the image's own view to that of another one of the class.
    own = see(index, changed).image_BCHW
    every = see(np.arange(300), changed)
    for b in range(20):
        share = float(seen.share_B[b])
        partners = every.image_BCHW[every.label_B == seen.partner_B[b]]
        mixed = share * own[b] + (1 - share) * partners
        assert (mixed - seen.image_BCHW[b]).abs().amax((1, 2, 3)).min() < 1e-5


def test_mixtures_follow_the_beta_distribution() -> None:
    index = np.arange(4000) % 300
    shares = [
        views(digits(), index[i : i + 300], RAW, NONE.model_copy(update={"mixup": 0.4}), 0, i)
        for i in range(0, 4000, 300)
    ]
    share = torch.cat([seen.share_B for seen in shares if seen.share_B is not None]).double()
    # Beta(a, a) has variance 1 / (4 (2 a + 1)) about one half.
    assert ((share - 0.5) ** 2).mean() == pytest.approx(1 / (4 * 1.8), rel=0.05)
