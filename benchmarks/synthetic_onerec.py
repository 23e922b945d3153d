"""Requests, catalogues and models of OneRec made of random ids: for measures of speed and memory.

Needs torch and NumPy alone, so that it runs on a bare machine with a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from components.training.onerec.config import OneRecConfig
    from components.training.onerec.data import Batch
    from components.training.onerec.decode import DeviceTrie


#: Tags of an item.
TAGS = 2
#: The preset `scientific` of the specification's sizes, of a catalogue like Amazon Scientific, and
#: one that tests run in no time.
SCIENTIFIC: dict[str, int] = {
    "num_items": 4344,
    "codebook_size": 256,
    "d_model": 128,
    "heads": 4,
    "ffn": 256,
    "positive_feedback": 20,
}
SMALLEST: dict[str, int] = SCIENTIFIC | {
    "num_items": 300,
    "codebook_size": 16,
    "d_model": 32,
    "heads": 2,
    "ffn": 64,
}


def catalogue(items: int, codebook_size: int, levels: int = 3, seed: int = 0) -> np.ndarray:
    """Codes of every item, drawn evenly: int32 [items, levels]."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return rng.integers(0, codebook_size, (items, levels)).astype(np.int32)


def device_trie(codes_NQ: np.ndarray, device: str | torch.device = "cpu") -> DeviceTrie:
    """The tree of a catalogue in which every item is as popular as any other."""
    import numpy as np

    from components.training.onerec.decode import DeviceTrie
    from components.training.onerec.trie import build_trie

    return DeviceTrie.on(build_trie(codes_NQ, np.ones(len(codes_NQ), np.int64)), device)


def full_batch(
    config: OneRecConfig,
    codes_NQ: np.ndarray,
    size: int,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Batch:
    """Requests whose histories fill every pathway, with a target each."""
    import numpy as np
    import torch

    from components.training.onerec.data import (
        DURATION_BUCKETS,
        FEEDBACK_BITS,
        GAP_BUCKETS,
        WATCH_BUCKETS,
        Batch,
        Events,
    )

    rng = np.random.default_rng(seed)

    def bucket(high: int, length: int, kind: Any = np.uint8) -> Any:
        return torch.from_numpy(rng.integers(0, high, (size, length)).astype(kind))

    def rows(high: int, *shape: int) -> Any:
        return torch.from_numpy(rng.integers(0, high, (size, *shape))) if high else None

    def events(name: str, length: int) -> Events:
        item_BL = rng.integers(0, len(codes_NQ), (size, length))
        has_tags, width = config.tag_rows > 0, config.content_width
        content_BLD = rng.standard_normal((size, length, width), np.float32) if width else None
        return Events(
            item_BL=torch.from_numpy(item_BL % config.num_items),
            sid_BLQ=torch.from_numpy(codes_NQ[item_BL].astype(np.int64)),
            feedback_BL=bucket(1 << FEEDBACK_BITS, length, np.int16),
            gap_BL=bucket(GAP_BUCKETS, length),
            watch_BL=bucket(WATCH_BUCKETS, length),
            duration_BL=bucket(DURATION_BUCKETS, length),
            mask_BL=torch.ones(size, length, dtype=torch.bool),
            author_BL=rows(config.author_rows, length),
            tag_BLT=rows(config.tag_rows, length, TAGS),
            tag_weight_BLT=torch.full((size, length, TAGS), 1 / TAGS) if has_tags else None,
            content_BLD=torch.from_numpy(content_BLD) if content_BLD is not None else None,
            count_BL=torch.ones(size, length) if name == "lifelong" else None,
        )

    lengths = {
        "short_term": config.short_term,
        "positive_feedback": config.positive_feedback,
        "lifelong": config.lifelong.entries,
    }
    static = [torch.from_numpy(rng.integers(0, high, size)) for high in config.static_rows]
    target_BQ = codes_NQ[rng.integers(0, len(codes_NQ), size)].astype(np.int64)
    batch = Batch(
        {name: events(name, length) for name, length in lengths.items() if length},
        torch.from_numpy(target_BQ),
        torch.zeros(size, dtype=torch.long),
        torch.stack(static, 1) if static else None,
        is_padded=False,
    )
    return batch.to(device)
