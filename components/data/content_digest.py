"""A name for what something learned holds, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt


def content_digest(arrays: Mapping[str, npt.NDArray[Any]], facts: object = None) -> str:
    """Of names, types, shapes and values, and of what JSON says beside them: 16 hex digits."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:16]
