"""The `item_features` stage: what is known of an item, as one vector."""

from __future__ import annotations

from components.curation.item_features.config import ItemFeaturesParams
from components.pipeline.stage import Inputs, Outputs, Run, stage


@stage(
    inputs=("catalogue", "items", "train_sequences"),
    outputs=("item_embedding",),
    params=ItemFeaturesParams,
)
def item_features(
    params: ItemFeaturesParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Embeds items by text, tags, author and what train users did together with them."""
    import numpy as np
    import pyarrow.compute as pc

    from components.curation.item_features.embedding import embed

    catalogue = inputs["catalogue"].read_table(columns=["item_id"])
    items = inputs["items"].read_table(columns=["item_id", "title", "caption", "tags", "author_id"])
    # Items that only interactions name have no row here: take() by null gives them nulls.
    row = pc.index_in(catalogue["item_id"], items["item_id"].combine_chunks()).combine_chunks()
    items = items.take(row)
    embedding, known = embed(
        pc.fill_null(items["title"], "").to_pylist(),
        pc.fill_null(items["caption"], "").to_pylist(),
        items["tags"],
        items["author_id"],
        inputs["train_sequences"].batches(columns=["item_index", "positive"]),
        params,
        run.seed,
    )
    zero = int((~embedding.any(axis=1)).sum())
    facts = {
        "items": len(embedding),
        "dimension": params.dimension,
        "items_known_by": known,
        "items_unknown_to_all": zero,
        "norm_quartiles": np.quantile(
            np.linalg.norm(embedding, axis=1), [0.25, 0.5, 0.75]
        ).tolist(),
    }
    outputs["item_embedding"].save_state_dict({"embedding": embedding})
    outputs["item_embedding"].write_json(facts)
    return {
        "items": float(len(embedding)),
        "dimension": float(params.dimension),
        "distinct_vectors": float(len(np.unique(embedding, axis=0))),
        **{f"items_with_{name}": float(count) for name, count in known.items()},
    }
