"""Labelled images: one tensor of bytes in memory, read from parquet row group by row group.

Shapes: N images, C = 3 colours, H height, W width, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from components.pipeline.errors import StageError

COLUMNS = ("image_id", "label", "image")
REMEDY = (
    "bring a parquet file with the columns image_id (string), label (integers from 0) and image "
    "(bytes of a JPEG or PNG file)"
)
#: Rows whose files are held at once.
ROWS = 1024
CHUNK = 1 << 12


@dataclass(frozen=True)
class Images:
    """Images of one size with their classes.

    Attributes:
        pixel_NCHW: uint8, red, green and blue.
        label_N: int64 classes.
        image_id_N: names, in the same order.
    """

    pixel_NCHW: Tensor
    label_N: Tensor
    image_id_N: Sequence[str]

    def __len__(self) -> int:
        return len(self.label_N)

    def take(self, index_S: npt.NDArray[np.integer]) -> Images:
        """Some of them, in the order asked for."""
        place_S = torch.from_numpy(np.asarray(index_S, np.int64)).to(self.label_N.device)
        names = [self.image_id_N[i] for i in index_S.tolist()]
        return Images(self.pixel_NCHW[place_S], self.label_N[place_S], names)

    def to(self, device: str | torch.device) -> Images:
        """On a device."""
        pixel_NCHW, label_N = (x.to(device) for x in (self.pixel_NCHW, self.label_N))
        return replace(self, pixel_NCHW=pixel_NCHW, label_N=label_N)


@dataclass(frozen=True)
class Normalisation:
    """What brings the colours of a training set to mean 0 and standard deviation 1.

    Attributes:
        mean_C, std_C: by colour, black being 0 and the brightest 1.
    """

    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]

    @classmethod
    def of(cls, images: Images) -> Normalisation:
        """Of the training images, exactly: their bytes are counted, not added up in floats."""
        colours = images.pixel_NCHW.shape[1]
        count_CV = torch.zeros(colours, 256, dtype=torch.int64)
        for part in images.pixel_NCHW.split(CHUNK):
            for c in range(colours):
                count_CV[c] += torch.bincount(part[:, c].flatten().int(), minlength=256).cpu()
        share_CV = count_CV.double() / count_CV.sum(1, keepdim=True)
        value_V = torch.arange(256, dtype=torch.float64) / 255
        mean_C = share_CV @ value_V
        variance_C = (share_CV * (value_V - mean_C[:, None]).square()).sum(1)
        # A colour that never changes says nothing, and is not to become infinite.
        std_C = variance_C.sqrt().clamp_min(1 / 255)
        return cls(tuple(mean_C.tolist()), tuple(std_C.tolist()))

    def apply(self, pixel_BCHW: Tensor) -> Tensor:
        """float32 of uint8 pixels, of the same shape."""
        mean_C, std_C = (
            torch.tensor(x, device=pixel_BCHW.device)[:, None, None]
            for x in (self.mean_C, self.std_C)
        )
        return (pixel_BCHW / 255 - mean_C) / std_C


def read_images(
    path: str | Path, size: int, classes: int, row_groups: Sequence[int] | None = None
) -> Images:
    """Decode the images of a parquet file (`COLUMNS`); a few encoded ones are held at once.

    Args:
        size: height and width in pixels that all have.
        classes: labels are 0 … classes - 1.
        row_groups: those that are read, in this order; None: all.

    Raises:
        StageError: there is no such table, or an image cannot be decoded, has another size or no
            label; names file, row group, row in it and image_id.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _require_columns(file.schema_arrow, str(path))
            groups = range(file.num_row_groups) if row_groups is None else row_groups
            beyond = [group for group in groups if not 0 <= group < file.num_row_groups]
            if beyond:
                raise StageError(
                    f"there is no row group {beyond[0]}: the file has {file.num_row_groups}",
                    where=str(path),
                    remedy="choose other row groups, or write the file as it was described",
                )
            rows = sum(file.metadata.row_group(group).num_rows for group in groups)
            if not rows:
                raise StageError("no images", where=str(path), remedy=REMEDY)
            pixel_NHWC = np.empty((rows, size, size, 3), np.uint8)
            label_N, names = np.empty(rows, np.int64), list[str]()
            for group in groups:
                for row, name, label, encoded in _rows(file, group):
                    place = _Place(str(path), group, row, name)
                    label_N[len(names)] = _label(label, classes, place)
                    pixel_NHWC[len(names)] = _decode(encoded, size, place)
                    names.append(_name(name, place))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise StageError(
            f"no readable parquet file: {text}", where=str(path), remedy=REMEDY
        ) from error
    pixel_NCHW = torch.from_numpy(pixel_NHWC).permute(0, 3, 1, 2).contiguous()
    return Images(pixel_NCHW, torch.from_numpy(label_N), names)


@dataclass(frozen=True)
class _Place:
    """One row, as errors name it."""

    path: str
    group: int
    row: int
    image_id: str | None

    def __str__(self) -> str:
        return f"{self.path} row group {self.group} row {self.row} image_id {self.image_id!r}"


def _require_columns(schema: pa.Schema, where: str) -> None:
    kinds = {
        "image_id": (pt.is_string, pt.is_large_string),
        "label": (pt.is_integer,),
        "image": (pt.is_binary, pt.is_large_binary),
    }
    for name, are_right in kinds.items():
        if name not in schema.names:
            raise StageError(f"there is no column '{name}'", where=where, remedy=REMEDY)
        found = schema.field(name).type
        if not any(is_right(found) for is_right in are_right):
            raise StageError(f"column '{name}' is {found}", where=where, remedy=REMEDY)


_Row = tuple[int, str | None, int | None, bytes | None]


def _rows(file: pq.ParquetFile, group: int) -> Iterator[_Row]:
    """Row within the group, image_id, label and encoded image."""
    row = 0
    for batch in file.iter_batches(ROWS, row_groups=[group], columns=list(COLUMNS)):
        for values in zip(*(batch.column(name).to_pylist() for name in COLUMNS), strict=True):
            yield row, *values
            row += 1


def _name(name: str | None, place: _Place) -> str:
    if name is None:
        raise StageError("an image without image_id", where=str(place), remedy=REMEDY)
    return name


def _label(label: int | None, classes: int, place: _Place) -> int:
    if label is None or not 0 <= label < classes:
        what = "no label" if label is None else f"label {label}"
        raise StageError(
            f"an image with {what}: labels are 0 to {classes - 1}",
            where=str(place),
            remedy="label the image or leave it out; check the number of classes",
        )
    return label


def _decode(encoded: bytes | None, size: int, place: _Place) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C]"""
    try:
        with Image.open(io.BytesIO(encoded or b""), formats=("JPEG", "PNG")) as image:
            # The header has the size: nothing large is decoded to be refused.
            if image.size != (size, size):
                width, height = image.size
                raise StageError(
                    f"an image of {width} × {height} pixels, where {size} × {size} are needed",
                    where=str(place),
                    remedy="bring all images to one size and say which: image_size",
                )
            return np.asarray(image.convert("RGB"))
    except _UNDECODABLE as error:
        text = str(error) if encoded else "it has no bytes"
        raise StageError(
            f"an image that cannot be decoded: {text}",
            where=str(place),
            remedy="write the image again as JPEG or PNG, or leave it out",
        ) from error


#: What Pillow raises of bytes that are no image, end too early or contradict themselves.
_UNDECODABLE: tuple[type[Exception], ...] = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)
