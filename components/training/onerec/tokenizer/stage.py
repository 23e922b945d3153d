"""The stages of the tokenizer: `align_items` draws items together, `semantic_ids` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from components.pipeline.params_base import Seed
from components.pipeline.stage import Inputs, Outputs, Run, stage
from components.training.onerec.config import AlignmentConfig, TokenizerConfig

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from components.pipeline.artifacts import Input
    from components.training.onerec.tokenizer.alignment import ItemTokens
    from components.training.onerec.tokenizer.item_aligner import ItemAligner


class AlignItemsParams(AlignmentConfig):
    """How item embeddings are aligned with what users do."""

    seed: Seed = Field(0, description="weights, order of pairs, what is sampled and held out")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads; others give other last bits")


class SemanticIdsParams(TokenizerConfig):
    """How item embeddings become semantic ids."""

    seed: Seed = Field(0, description="starts of k-means and RQ-VAE")
    threads: int = Field(1, ge=1, le=1024, description="CPU threads; others give other last bits")
    shuffled: bool = Field(
        False,
        description="a control: items of equal popularity trade their ids, which then say nothing "
        "of them",
    )


@stage(
    inputs=("catalogue", "items", "train_sequences", "item_embedding", "item_tokens"),
    outputs=("item_pairs", "aligned_embedding", "item_aligner"),
    params=AlignItemsParams,
)
def align_items(
    params: AlignItemsParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Compresses item tokens and draws items together that users take together.

    ``held_out_recall_at_10`` is of pairs that training did not draw. Neither they nor their items
    are unseen: co-occurrence, which is a part of tokens and embeddings, is counted in all train
    sequences. The same recall of the fused embedding is what it is to be compared with.
    """
    import numpy as np

    from components.pipeline.cpu_threads import cpu_threads
    from components.training.onerec.tokenizer.alignment import (
        ItemTokens,
        hold_out,
        retrieval_recall,
    )
    from components.training.onerec.tokenizer.captions import caption_ids
    from components.training.onerec.tokenizer.item_aligner import ItemAligner
    from components.training.onerec.tokenizer.pairs import (
        PAIR_SCHEMA,
        item_pairs,
        occurrences,
        positive_events,
    )

    config = AlignmentConfig(**params.model_dump(include=set(AlignmentConfig.model_fields)))
    fused_NC = inputs["item_embedding"].load_state_dict()["embedding"]
    given = inputs["item_tokens"].load_state_dict()
    table = PAIR_SCHEMA.empty_table()
    if config.method != "none":
        events = positive_events(inputs["train_sequences"].batches(["item_index", "positive"]))
        if events.all_count:
            run.note("no train event is positive: item pairs are those of all events")
        table = item_pairs(events, len(fused_NC), config.pairing, run.seed)
        if not table.num_rows:
            run.note("no two train events of a user are positive: items are not aligned")
    pair_P2 = np.stack([table["left"].to_numpy(), table["right"].to_numpy()], 1)
    is_measured_P = hold_out(pair_P2, config.held_out, run.seed)
    learned_P2, measured_P2 = pair_P2[~is_measured_P], pair_P2[is_measured_P]
    aligner = ItemAligner.unaligned(config)
    with cpu_threads(params.threads):
        if len(learned_P2):
            titles = catalogue_titles(inputs["catalogue"].read_table(["item_id"]), inputs["items"])
            items = ItemTokens(given["tokens"], given["mask"], caption_ids(titles, config.caption))
            if config.caption.weight and not len(items.captioned):
                run.note("no item has a text: the caption loss is left out")
            times_P = occurrences(table)[~is_measured_P]
            aligner = _trained(config, items, fused_NC, learned_P2, times_P, run)
        embedding_ND = aligner.embed(fused_NC, given["tokens"], given["mask"])
        metrics = {"dimension": float(embedding_ND.shape[1]), "pairs": float(table.num_rows)}
        if len(measured_P2):
            metrics |= {
                "held_out_recall_at_10": retrieval_recall(embedding_ND, measured_P2),
                "held_out_recall_at_10_fused": retrieval_recall(fused_NC, measured_P2),
            }
    made_by = {
        "item_encoder_digest": inputs["item_embedding"].read_json()["item_encoder_digest"],
        "item_aligner_digest": aligner.digest,
    }
    outputs["item_pairs"].write_table(table)
    outputs["aligned_embedding"].save_state_dict({"embedding": embedding_ND})
    outputs["aligned_embedding"].write_json({"method": aligner.config.method, **metrics, **made_by})
    outputs["item_aligner"].save_state_dict(aligner.state())
    outputs["item_aligner"].write_json(aligner.facts())
    return metrics


@stage(
    inputs=("catalogue", "aligned_embedding"), outputs=("semantic_ids",), params=SemanticIdsParams
)
def semantic_ids(
    params: SemanticIdsParams, inputs: Inputs, outputs: Outputs, run: Run
) -> dict[str, float]:
    """Writes every item as a short code, coarse to fine, by residual quantisation.

    Codebooks are of all items of the catalogue, which is as of the end of the log.
    """
    import torch

    from components.pipeline.cpu_threads import cpu_threads
    from components.training.onerec.tokenizer import semantic_ids as tokenizer
    from components.training.onerec.trie import shuffle_sids

    embedding_ND = inputs["aligned_embedding"].load_state_dict()["embedding"]
    made_by = inputs["aligned_embedding"].read_json()
    with cpu_threads(params.threads):
        ids = tokenizer.fit(embedding_ND, params, run.seed)
        statistics = tokenizer.measure(embedding_ND, ids)
    size = ids.quantizer.codebooks_QKD.shape[1]
    codes_NQ, version = ids.codes_NQ.numpy(), ids.version
    if params.shuffled:
        popularity_N = inputs["catalogue"].read_table(["train_count"])["train_count"].to_numpy()
        codes_NQ, version = shuffle_sids(codes_NQ, popularity_N, run.seed), f"{version}-shuffled"
    state = {"codes": torch.from_numpy(codes_NQ), **ids.quantizer.state()}
    outputs["semantic_ids"].save_state_dict(state)
    outputs["semantic_ids"].write_json(
        {
            # A model names the quantiser that it was trained for.
            "version": version,
            # What encodes new items has to be what these were encoded with.
            "item_encoder_digest": made_by["item_encoder_digest"],
            "item_aligner_digest": made_by["item_aligner_digest"],
            "num_items": len(codes_NQ),
            "num_levels": codes_NQ.shape[1],
            "codebook_size": size,
            "method": params.method,
            "dimension": embedding_ND.shape[1],
            "tokenizer": params.model_dump(mode="json", include=set(TokenizerConfig.model_fields)),
            "shuffled": params.shuffled,
            "seed": run.seed,
            "mse_per_level": list(statistics.mse),
            "relative_error": list(statistics.relative_error),
            "utilisation": list(statistics.utilisation),
            "entropy": list(statistics.entropy),
            "distinct": statistics.distinct,
            "colliding_items": statistics.colliding,
            "largest_bucket": statistics.largest,
            "collisions": params.collisions,
            "colliding_before": statistics.colliding_before,
            "largest_before": statistics.largest_before,
            "moved": statistics.moved,
        }
    )
    return {"codebook_size": float(size), **statistics.flat()}


def _trained(
    config: AlignmentConfig,
    items: ItemTokens,
    fused_NC: torch.Tensor,
    pair_P2: np.ndarray,
    times_P: np.ndarray,
    run: Run,
) -> ItemAligner:
    from components.training.onerec.tokenizer.alignment import LOG_EVERY_STEPS, align
    from components.training.onerec.tokenizer.item_aligner import ItemAligner

    with run.progress(config.steps, "alignment") as bar:

        def log(metrics: Mapping[str, float], step: int) -> None:
            run.log(metrics, step)
            bar.advance(step % LOG_EVERY_STEPS or LOG_EVERY_STEPS)

        aligner = align(items, pair_P2, config, run.seed, log, times_P=times_P)
        return ItemAligner.of(config, aligner, fused_NC, items.token_NMt, items.mask_NM)


def catalogue_titles(catalogue: pa.Table, items: Input) -> list[str]:
    """Title of every item of the catalogue, its caption where it has none, "" where neither."""
    import pyarrow.compute as pc

    table = items.read_table(["item_id", "title", "caption"])
    row = pc.index_in(catalogue["item_id"], table["item_id"].combine_chunks()).combine_chunks()
    text = pc.coalesce(table["title"], table["caption"]).take(row)
    titles: list[str] = pc.fill_null(text, "").to_pylist()
    return titles
