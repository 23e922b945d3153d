"""Small images for the tests of vision transformers: handwritten digits, and files of images."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits

from components.training.vit.config import VitConfig
from components.training.vit.data import Images

#: For digits: 8 × 8 pixels, 5 tokens.
TINY = VitConfig(image_size=8, patch=4, d_model=24, heads=2, layers=2, mlp=32)


@functools.cache
def digits(count: int = 300) -> Images:
    """Digits of scikit-learn in grey."""
    pixel_NP, label_N = load_digits(return_X_y=True)
    pixel_NHW = torch.from_numpy((pixel_NP * 255 / 16).astype(np.uint8)).view(-1, 1, 8, 8)
    names = [f"digit/{n}" for n in range(count)]
    return Images(
        pixel_NHW[:count].repeat(1, 3, 1, 1), torch.from_numpy(label_N[:count]).long(), names
    )


def encoded(pixel_HWC: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixel_HWC).save(file, kind, **options)
    return file.getvalue()


def write_images(
    path: Path,
    files: Sequence[bytes | None],
    labels: Sequence[int | None],
    names: Sequence[str | None] | None = None,
    row_group_size: int = 4,
) -> Path:
    """A parquet file of images."""
    columns = {
        "image_id": pa.array(names or [f"n/{i}" for i in range(len(files))], pa.string()),
        "label": pa.array(labels, pa.int8()),
        "image": pa.array(files, pa.binary()),
    }
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
