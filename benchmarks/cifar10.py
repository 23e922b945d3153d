"""Images of CIFAR-10 as tensors, of any edge, for whoever trains on them.

The data is the shared `cifar10/train.parquet`: ten row groups of 5,000 JPEGs in a hashed order.
Groups 0 to 8 are for training and choosing, group 9 is the test.

Shapes: N images, C colours, H, W edges.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Int64 = npt.NDArray[np.int64]

FILE = "train.parquet"
TRAIN_GROUPS, TEST_GROUPS = range(9), range(9, 10)
CLASSES = 10


@dataclass(frozen=True)
class Images:
    """Images with their classes.

    Attributes:
        id_N: their names.
        pixel_NCHW: uint8.
        label_N: int64.
    """

    id_N: tuple[str, ...]
    pixel_NCHW: torch.Tensor
    label_N: torch.Tensor

    def standardised(self, by: Images) -> torch.Tensor:
        """float32 [N, C, H, W]: each colour has mean 0 and deviation 1 over the images ``by``."""
        whole = by.pixel_NCHW.float()
        mean_C, deviation_C = whole.mean((0, 2, 3)), whole.std((0, 2, 3))
        return (self.pixel_NCHW - mean_C[:, None, None]) / deviation_C[:, None, None]

    def part(self, first: int, last: int) -> Images:
        """Those from ``first`` up to ``last``, the latter left out."""
        rows = slice(first, last)
        return Images(self.id_N[rows], self.pixel_NCHW[rows], self.label_N[rows])


def image_ids(folder: Path, groups: Sequence[int]) -> list[str]:
    """Names of the images of some row groups, in their order."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(folder / FILE).read_row_groups([*groups], columns=["image_id"])
    names: list[str] = table["image_id"].to_pylist()
    return names


def by_hash(ids: Sequence[str], count: int) -> Int64:
    """``count`` of the names in a random order that depends on nothing but the names."""
    digests = [hashlib.sha256(name.encode()).digest() for name in ids]
    order = sorted(range(len(ids)), key=digests.__getitem__)
    return np.array(order[:count], np.int64)


def read_images(
    folder: Path, groups: Sequence[int], edge: int = 16, rows: Int64 | None = None
) -> Images:
    """Images of some row groups, made smaller by the mean over areas.

    Args:
        groups: row groups, one after the other.
        edge: pixels of height and width.
        rows: which of their rows, in the order wanted; None: all.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from PIL import Image

    columns = ["image_id", "label", "image"]
    table = pq.ParquetFile(folder / FILE).read_row_groups([*groups], columns=columns)
    if rows is not None:
        table = table.take(pa.array(rows))
    pixel_NHWC = np.empty((len(table), edge, edge, 3), np.uint8)
    for place, encoded in enumerate(table["image"]):
        with Image.open(io.BytesIO(encoded.as_py())) as image:
            small = image.convert("RGB").resize((edge, edge), Image.Resampling.BOX)
            pixel_NHWC[place] = np.asarray(small)
    return Images(
        tuple(table["image_id"].to_pylist()),
        torch.from_numpy(pixel_NHWC).permute(0, 3, 1, 2).contiguous(),
        torch.from_numpy(table["label"].to_numpy().astype(np.int64)),
    )
