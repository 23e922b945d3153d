"""The `item_features` stage: what is known of an item, as some tokens and as one vector."""

from __future__ import annotations

from components.curation.item_features.config import ItemFeaturesParams
from components.pipeline.stage import Inputs, Outputs, Run, stage


def visual_digest(params: ItemFeaturesParams) -> str | None:
    """Digest of the visual features, which lie outside the store; None: none are given."""
    if params.visual is None:
        return None
    from components.data.visual_features import digest

    return digest(params.visual)


@stage(
    inputs=("catalogue", "items", "train_sequences"),
    outputs=("item_embedding", "item_tokens", "item_encoder"),
    params=ItemFeaturesParams,
    external=visual_digest,
)
def item_features(
    params: ItemFeaturesParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Embeds items by text, tags, author and what train users did together with them.

    All items of the catalogue, which is as of the end of the log: that an item exists is known of
    later periods too, what users did with it is not.
    """
    import numpy as np
    import pyarrow.compute as pc

    from components.curation.item_features.embedding import fit
    from components.data import visual_features
    from components.data.item_encoder import COLUMNS
    from components.pipeline.cpu_threads import cpu_threads

    catalogue = inputs["catalogue"].read_table(columns=["item_id", "train_positive_count"])
    items = inputs["items"].read_table(columns=list(COLUMNS))
    # Items that only interactions name have no row here: take() by null gives them nulls.
    row = pc.index_in(catalogue["item_id"], items["item_id"].combine_chunks()).combine_chunks()
    items = items.take(row)
    items = items.set_column(
        items.schema.get_field_index("item_id"), "item_id", catalogue["item_id"]
    )
    visual = None if params.visual is None else visual_features.read(params.visual)
    batches = inputs["train_sequences"].batches(columns=["item_index", "positive"])
    some_positive = pc.any(pc.greater(catalogue["train_positive_count"], 0)).as_py()
    if params.cooccurrence_weight and params.positive_only and not some_positive:
        run.note("no train event is positive: co-occurrence is that of all events")
        params = params.model_copy(update={"positive_only": False})
    with cpu_threads(params.threads):
        encoder, known = fit(items, batches, params, run.seed, visual)
        encoded = encoder.encode(items, visual)
    encoder = encoder.for_new_items()
    embedding = encoded.embedding_ND
    facts = {
        "items": len(embedding),
        "dimension": params.dimension,
        # What is quantised names all that made it: `NewItemEncoder` compares.
        "item_encoder_digest": encoder.digest,
        "items_known_by": known,
        "items_unknown_to_all": int((~encoded.mask_NM.any(axis=1)).sum()),
        "norm_quartiles": np.quantile(
            np.linalg.norm(embedding, axis=1), [0.25, 0.5, 0.75]
        ).tolist(),
    }
    outputs["item_embedding"].save_state_dict({"embedding": embedding})
    outputs["item_embedding"].write_json(facts)
    outputs["item_tokens"].save_state_dict({"tokens": encoded.token_NMt, "mask": encoded.mask_NM})
    kinds = encoder.facts["kinds"]
    shares = dict(zip(kinds, encoded.mask_NM.mean(0).tolist(), strict=True))
    outputs["item_tokens"].write_json({"kinds": kinds, "share_of_items": shares})
    outputs["item_encoder"].save_state_dict(encoder.arrays)
    outputs["item_encoder"].write_json(encoder.facts)
    return {
        "items": float(len(embedding)),
        "dimension": float(params.dimension),
        "distinct_vectors": float(len(np.unique(embedding, axis=0))),
        "tokens_an_item": float(encoded.mask_NM.sum(1).mean()),
        **{f"items_with_{name}": float(count) for name, count in known.items()},
    }
