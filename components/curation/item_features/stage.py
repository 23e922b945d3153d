"""The `item_features` stage: one embedding an item."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from components.pipeline.stage import Inputs, Outputs, Run, stage


class ItemFeaturesParams(BaseModel):
    """Which views of an item count, and how much."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(0, ge=0, description="randomised singular value decompositions")
    dimension: int = Field(64, ge=2, le=4096, description="width of the embedding")
    view_width: int = Field(64, ge=2, le=4096, description="width of each view before it is joined")
    text_weight: float = Field(0.5, ge=0, description="weight of title and caption")
    tags_weight: float = Field(0.5, ge=0, description="weight of tags")
    author_weight: float = Field(0.1, ge=0, description="weight of the author")
    cooccurrence_weight: float = Field(
        1.0, ge=0, description="weight of being watched together in the training period"
    )
    window: int = Field(5, ge=1, le=100, description="events between two items watched together")


@stage(
    inputs=("catalogue", "items", "train_sequences"),
    outputs=("item_embedding",),
    params=ItemFeaturesParams,
)
def item_features(
    params: ItemFeaturesParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Embeds every item from its text, tags, author and train-only co-occurrence."""
    import numpy as np
    import pyarrow.compute as pc

    from components.curation.item_features import embedding
    from components.pipeline.errors import DataContractError, ParamsError

    item_ids = inputs["catalogue"].read_table(["item_id"])["item_id"]
    items = inputs["items"].read_table(["item_id", "title", "caption", "tags", "author_id"])
    # Items of the catalogue that the table lacks get nulls.
    known = items.take(pc.index_in(item_ids, items["item_id"]))
    titles, captions = known["title"].to_pylist(), known["caption"].to_pylist()
    texts = [f"{title or ''} {caption or ''}" for title, caption in zip(titles, captions)]
    tags = [[tag for tag in row or () if tag] for row in known["tags"].to_pylist()]
    author = known["author_id"].fill_null(-1).to_numpy()
    width, seed = params.view_width, run.seed
    with run.progress(4, "views") as bar:
        views = {}
        if params.text_weight:
            views["text"] = embedding.text_view(texts, width, seed)
        bar.advance()
        if params.tags_weight:
            views["tags"] = embedding.tags_view(tags, width, seed)
        bar.advance()
        if params.author_weight:
            views["author"] = embedding.author_view(author, width, seed)
        bar.advance()
        if params.cooccurrence_weight:
            views["cooccurrence"] = embedding.cooccurrence_view(
                inputs["train_sequences"].batches(["item_index"]),
                len(item_ids),
                params.window,
                width,
                seed,
            )
        bar.advance()
    weights = {name: getattr(params, f"{name}_weight") for name in views}
    present = [(view, weights[name]) for name, view in views.items() if view is not None]
    if not weights:
        raise ParamsError(
            "every weight is 0",
            where="item_features",
            remedy="give text_weight, tags_weight, author_weight or cooccurrence_weight",
        )
    if not present:
        raise DataContractError(
            "no item has text, tags or a shared author, and no two items were watched together",
            where="artifact 'items'",
            remedy="bring an items table with titles or tags, or more interactions",
        )
    embedded = embedding.combine(present, params.dimension)
    distinct = len(np.unique(embedded, axis=0))
    outputs["item_embedding"].save_state_dict({"embedding": embedded})
    facts = {
        "num_items": len(embedded),
        "dimension": embedded.shape[1],
        "views": {name: view.shape[1] for name, view in views.items() if view is not None},
        "distinct": distinct,
    }
    outputs["item_embedding"].write_json(facts)
    return {
        "dimension": float(embedded.shape[1]),
        "views": float(len(present)),
        "distinct_embeddings": float(distinct),
    }
