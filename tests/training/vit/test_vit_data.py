"""Claims about reading images: what is read, what is refused and where it says it is."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from vit_world import digits, encoded, write_images

from components.pipeline.errors import StageError
from components.training.vit.data import Images, Normalisation, read_images

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (10, 8, 8, 3), np.uint8)
FILES = [encoded(pixel_HWC) for pixel_HWC in PIXELS]
LABELS = [3, 1, 2, 0, 1, 2, 3, 0, 1, 3]


def test_images_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    images = read_images(write_images(tmp_path / "a.parquet", FILES, LABELS), 8, 4)
    assert images.pixel_NCHW.dtype == torch.uint8
    assert torch.equal(images.pixel_NCHW, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert images.label_N.tolist() == LABELS
    assert images.image_id_N == [f"n/{i}" for i in range(10)]


def test_row_groups_are_chosen(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", FILES, LABELS)
    images = read_images(path, 8, 4, [2, 0])
    assert images.image_id_N == ["n/8", "n/9", "n/0", "n/1", "n/2", "n/3"]
    assert images.label_N.tolist() == [1, 3, *LABELS[:4]]
    with pytest.raises(StageError, match="no row group 3: the file has 3"):
        read_images(path, 8, 4, [3])


def test_some_are_taken_by_number() -> None:
    some = digits().take(np.array([7, 2]))
    assert some.image_id_N == ["digit/7", "digit/2"]
    assert torch.equal(some.pixel_NCHW, digits().pixel_NCHW[[7, 2]])
    assert some.label_N.tolist() == [7, 2]


def test_grey_images_and_such_with_transparency_become_colours(tmp_path: Path) -> None:
    grey = PIXELS[0, :, :, 0]
    alpha = np.concatenate([PIXELS[1], np.full((8, 8, 1), 255, np.uint8)], 2)
    path = write_images(tmp_path / "a.parquet", [encoded(grey), encoded(alpha)], [0, 1])
    images = read_images(path, 8, 4)
    assert torch.equal(images.pixel_NCHW[0], torch.from_numpy(grey).expand(3, 8, 8))
    assert torch.equal(images.pixel_NCHW[1], torch.from_numpy(PIXELS[1]).permute(2, 0, 1))


JPEG = encoded(PIXELS[0], "JPEG")
BAD: dict[str, tuple[bytes | None, int | None, str]] = {
    "no image": (b"these are no pixels", 0, "cannot be decoded"),
    "no bytes": (b"", 0, "it has no bytes"),
    "null": (None, 0, "it has no bytes"),
    "cut off": (FILES[0][:60], 0, "cannot be decoded"),
    "JPEG cut off": (JPEG[: len(JPEG) // 2], 0, "cannot be decoded"),
    "another format": (encoded(PIXELS[0], "GIF"), 0, "cannot be decoded"),
    "too large": (encoded(PIXELS.reshape(40, 16, 3)), 0, "16 × 40 pixels, where 8 × 8"),
    "no label": (FILES[0], None, "no label: labels are 0 to 3"),
    "no such label": (FILES[0], 4, "label 4: labels are 0 to 3"),
    "negative label": (FILES[0], -1, "label -1: labels are 0 to 3"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_image_is_named(tmp_path: Path, bad: str) -> None:
    file, label, message = BAD[bad]
    files, labels = [*FILES[:6], file, *FILES[7:]], [*LABELS[:6], label, *LABELS[7:]]
    path = write_images(tmp_path / "a.parquet", files, labels)
    with pytest.raises(StageError, match=message) as error:
        read_images(path, 8, 4)
    assert f"{path} row group 1 row 2 image_id 'n/6': " in str(error.value)
    assert error.value.remedy


def test_an_image_without_a_name_is_refused(tmp_path: Path) -> None:
    path = write_images(tmp_path / "a.parquet", FILES[:2], [0, 1], ["a", None])
    with pytest.raises(StageError, match="without image_id") as error:
        read_images(path, 8, 4)
    assert "row group 0 row 1" in str(error.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_bytes_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    """Whatever Pillow makes of damage, it is an image or an error that names it."""
    whole = np.frombuffer(encoded(PIXELS[0], kind), np.uint8)
    refused = []
    for _ in range(200):
        damaged = whole.copy()
        place = RANDOM.integers(0, len(whole), 3)
        damaged[place] = RANDOM.integers(0, 256, 3)
        path = write_images(tmp_path / "a.parquet", [damaged.tobytes()], [0])
        try:
            assert read_images(path, 8, 4).pixel_NCHW.shape == (1, 3, 8, 8)
        except StageError as error:
            refused.append(str(error))
    assert refused
    assert all("image_id 'n/0'" in message for message in refused)


def test_a_table_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(StageError, match="no readable parquet file"):
        read_images(path, 8, 4)
    path.write_bytes(b"no parquet")
    with pytest.raises(StageError, match="no readable parquet file"):
        read_images(path, 8, 4)
    pq.write_table(pa.table({"image_id": ["a"], "label": [1]}), path)
    with pytest.raises(StageError, match="no column 'image'"):
        read_images(path, 8, 4)
    pq.write_table(pa.table({"image_id": ["a"], "label": [1.0], "image": [b"a"]}), path)
    with pytest.raises(StageError, match="'label' is double"):
        read_images(path, 8, 4)
    with pytest.raises(StageError, match="no images"):
        read_images(write_images(path, [], []), 8, 4)


def test_a_normalised_training_set_has_mean_0_and_deviation_1() -> None:
    images = Images(torch.from_numpy(PIXELS).permute(0, 3, 1, 2) // 3, torch.zeros(10), [""] * 10)
    normalisation = Normalisation.of(images)
    value_NCHW = images.pixel_NCHW.double() / 255
    expected = (value_NCHW.mean((0, 2, 3)), value_NCHW.std((0, 2, 3), correction=0))
    for ours, theirs in zip((normalisation.mean_C, normalisation.std_C), expected, strict=True):
        assert ours == pytest.approx(theirs.tolist(), rel=1e-12)
    normal_NCHW = normalisation.apply(images.pixel_NCHW)
    assert normal_NCHW.dtype == torch.float32
    assert normal_NCHW.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert normal_NCHW.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_a_colour_that_never_changes_stays_finite() -> None:
    images = Images(torch.full((2, 3, 4, 4), 9, dtype=torch.uint8), torch.zeros(2), ["", ""])
    assert not Normalisation.of(images).apply(images.pixel_NCHW).abs().max() > 1e-6


def test_real_photos_are_those_of_the_file(shared_data: Path) -> None:
    path = shared_data / "cifar10" / "train.parquet"
    if not path.exists():
        pytest.skip(f"no CIFAR-10 at {path}")
    images = read_images(path, 32, 10, [9])
    table = pq.ParquetFile(path).read_row_group(9)
    assert images.image_id_N == table["image_id"].to_pylist()
    assert images.label_N.tolist() == table["label"].to_pylist()
    for row in (0, 1, 2500, 4999):
        with Image.open(io.BytesIO(table["image"][row].as_py())) as photo:
            pixel_CHW = torch.from_numpy(np.asarray(photo).transpose(2, 0, 1).copy())
        assert torch.equal(images.pixel_NCHW[row], pixel_CHW)
    # The known figures of CIFAR-10, up to a sample of 5,000 and JPEG.
    normalisation = Normalisation.of(images)
    assert normalisation.mean_C == pytest.approx((0.491, 0.482, 0.447), abs=0.01)
    assert normalisation.std_C == pytest.approx((0.247, 0.244, 0.262), abs=0.01)
