"""A registered version made of random ids: the artifacts that the service loads.

The model is untrained and knows no features of items and users; what its work takes does not depend
on its weights. The encoder of new items is fitted to a few titles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from components.training.onerec.config import OneRecConfig

#: Items that the encoder is fitted to, and the width of its embeddings.
FITTED, DIMENSION = 64, 8


def write_version(folder: Path, config: OneRecConfig, codes_NQ: np.ndarray) -> list[int]:
    """Write a folder for each artifact into ``folder``; the ids of the items.

    Args:
        codes_NQ: int32 semantic ids; the first item is the most popular one.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    from components.evaluation.registration.serving import ENCODER_FILES, MODEL_FILES
    from components.training.onerec.config import AlignmentConfig, TokenizerConfig
    from components.training.onerec.features import Features
    from components.training.onerec.model import OneRec
    from components.training.onerec.recommender import trained_on
    from components.training.onerec.tokenizer.item_aligner import ItemAligner

    places = {name: folder / name for name in MODEL_FILES + ENCODER_FILES}
    for place in places.values():
        place.mkdir(parents=True)
    items, rng = len(codes_NQ), np.random.default_rng(0)

    encoder, aligner = _encoder(), ItemAligner.unaligned(AlignmentConfig())
    save_arrays(dict(encoder.arrays), places["item_encoder"] / "model.safetensors")
    (places["item_encoder"] / "data.json").write_text(json.dumps(encoder.facts))
    save_file(aligner.state(), places["item_aligner"] / "model.safetensors")
    (places["item_aligner"] / "data.json").write_text(json.dumps(aligner.facts()))

    shape = (config.num_levels, config.codebook_size, DIMENSION)
    tokenizer = TokenizerConfig(
        method="plain", codebook_size=config.codebook_size, collisions="keep"
    )
    ids = {
        "version": "0",
        "num_levels": config.num_levels,
        "codebook_size": config.codebook_size,
        "dimension": DIMENSION,
        "tokenizer": tokenizer.model_dump(mode="json"),
        "item_encoder_digest": encoder.digest,
        "item_aligner_digest": aligner.digest,
    }
    codebooks = rng.standard_normal(shape, np.float32)
    save_arrays(
        {"codes": codes_NQ, "codebooks": codebooks}, places["semantic_ids"] / "model.safetensors"
    )
    (places["semantic_ids"] / "data.json").write_text(json.dumps(ids))

    torch.manual_seed(0)
    weights = {name: value.clone() for name, value in OneRec(config).state_dict().items()}
    save_file(weights, places["recommender"] / "model.safetensors")
    if config.memory.successors:
        save_arrays(_memory(config, rng), places["recommender"] / "memory.safetensors")
    written: dict[str, Any] = {"model": config.model_dump(), **trained_on(ids, codes_NQ)}
    written["targets"] = "positive"
    (places["recommender"] / "config.json").write_text(json.dumps(written))
    Features.none(items).save(places["recommender"])

    index = np.arange(items)
    columns: dict[str, Any] = {
        "item_index": index.astype(np.int32),
        "item_id": index * 7 + 1000,
        "train_count": index[::-1].copy(),
        "train_positive_count": index[::-1].copy(),
    }
    pq.write_table(pa.table(columns), places["catalogue"] / "table.parquet")
    item_ids: list[int] = columns["item_id"].tolist()
    return item_ids


def _memory(config: OneRecConfig, rng: np.random.Generator) -> dict[str, np.ndarray]:
    import numpy as np

    shape = (config.num_items, config.memory.successors)
    weight_NR = -np.sort(-rng.geometric(0.3, shape), axis=1).astype(np.float32)
    return {
        "item_NR": rng.integers(0, config.num_items, shape).astype(np.int32),
        "weight_NR": weight_NR,
        "total_N": weight_NR.sum(1),
    }


def _encoder() -> Any:
    """An `ItemEncoder` of titles and authors."""
    import pyarrow as pa

    from components.curation.item_features.config import ItemFeaturesParams
    from components.curation.item_features.embedding import fit

    titles = [f"word {place % 5} and word {place % 7}" for place in range(FITTED)]
    authors = [place // 4 for place in range(FITTED)]
    items = pa.table({"item_id": range(FITTED), "title": titles, "author_id": authors})
    params = ItemFeaturesParams(
        dimension=DIMENSION, block_dimension=DIMENSION, token_dimension=DIMENSION
    )
    return fit(items, [], params, 0)[0].for_new_items()
