"""Learns an item encoder of text, tags, author, numbers and train-only co-occurrence.

Each source of knowledge becomes a block: a sparse item × feature matrix, decomposed by a
randomised SVD into a few dimensions, with unit rows where the item is known to that source and
zero rows where it is not. Blocks are weighted, concatenated and rotated by PCA. A missing
co-occurrence block (new items) is predicted from the content blocks by ridge regression, so that a
new item lies near what it resembles instead of near all other new items. What is learned is kept as
an `ItemEncoder`, which encodes the catalogue itself and every item that comes later alike.

The catalogue is as of the end of the log: an item that only later periods name has a row too, and
takes part in the decompositions of content and in the PCA. What users did then takes no part.

What is dense grows with the items alone, by the width of all blocks side by side; item × item
counts stay sparse.

Shapes: N items, F features of a view, d width of a block, c width of all content blocks, D width of
the embedding, t width of a token, X numbers of an item, v width of a visual vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

from components.curation.item_features.config import ItemFeaturesParams
from components.data import item_encoder as encoder
from components.data.item_encoder import Float, ItemEncoder, unit_rows
from components.data.visual_features import VisualFeatures

Array = npt.NDArray[Any]

SVD_ITERATIONS = 4
RIDGE = 1.0
#: Items rotated at a time.
ROWS = 65_536
#: Terms kept of a view of text, those of most items: a projection's size is then bounded.
MAX_TERMS = 2**16


def fit(
    items: pa.Table,
    train_batches: Iterable[pa.RecordBatch],
    params: ItemFeaturesParams,
    seed: int,
    visual: VisualFeatures | None = None,
) -> tuple[ItemEncoder, dict[str, int]]:
    """Learn an encoder.

    Args:
        items: rows of `components.data.contracts.ITEMS` in the order of the catalogue.
        train_batches: train sequences, nothing later.
        visual: visual features of some of the items.

    Returns:
        the encoder, and ``{block: items it knows}``.
    """
    items = encoder.conform(items)
    weights = {
        "text": params.text_weight,
        "tags": params.tags_weight,
        "author": params.author_weight,
        "cooccurrence": params.cooccurrence_weight,
    }
    facts: dict[str, Any] = {
        "weights": weights,
        "tags": [],
        "kinds": [],
        "token_dimension": params.token_dimension,
    }
    arrays: dict[str, Array] = {}
    width = params.block_dimension
    if params.text_weight > 0:
        titles, captions = encoder.texts(items)
        joined = [f"{title}\n{caption}" for title, caption in zip(titles, captions, strict=True)]
        views = {
            "words": encoder.word_counts(joined),
            "characters": encoder.character_counts(titles, captions),
        }
        arrays |= _fit_terms(views, width, seed, text=True)
    if params.tags_weight > 0:
        known = pc.unique(items["tags"].combine_chunks().flatten()).drop_null()
        facts["tags"] = known.to_pylist()
        counts = encoder.listed_counts(items["tags"], known)
        arrays |= _fit_terms({"tags": counts}, width, seed)
    if params.author_weight > 0:
        counted = pc.value_counts(items["author_id"].drop_null().combine_chunks())
        # An author of a single item relates it to nothing.
        known = counted.field("values").filter(pc.greater(counted.field("counts"), 1))
        arrays["author.ids"] = known.to_numpy().astype(np.int64)
        counts = encoder.listed_counts(items["author_id"], known)
        arrays |= _fit_terms({"author": counts}, width, seed)
    arrays |= _fit_numbers(items, params.token_dimension, seed)

    content, _ = ItemEncoder(arrays, facts).content(items)
    found = {name: int(block.any(1).sum()) for name, block in content.items()}
    blocks = dict(content)
    if params.cooccurrence_weight > 0:
        counts = cooccurrence_counts(
            train_batches, len(items), params.window, positive_only=params.positive_only
        )
        block = _reduce_symmetric(ppmi(counts), width, seed)
        found["cooccurrence"] = int(block.any(1).sum())
        arrays["cooccurrence.item_id"] = items["item_id"].to_numpy()
        arrays["cooccurrence.block"] = block
        content_Nc = ItemEncoder(arrays, facts).joined(content) if content else None
        if content_Nc is not None:
            arrays |= _fit_ridge(block, content_Nc)
        blocks["cooccurrence"] = ItemEncoder(arrays, facts).predict_missing(block, content)
    mean, rotation = combine([(block, weights[name]) for name, block in blocks.items()], params)
    arrays |= {"pca.mean": mean, "pca.rotation": rotation}
    kinds = _kinds(found, arrays, params)
    if visual is not None:
        visual_arrays, vectors = _fit_visual(visual, items["item_id"], params)
        arrays |= visual_arrays
        kinds += [f"visual_{place}" for place in range(vectors)]
        found["visual"] = len(np.unique(visual.of_items(items["item_id"], 1)[0]))
    facts["kinds"] = kinds
    return ItemEncoder(arrays, facts), found


def _kinds(
    found: Mapping[str, int], arrays: Mapping[str, Array], params: ItemFeaturesParams
) -> list[str]:
    """Tokens in their order; a view that knows no item has none."""
    kinds = ["title", "caption", "characters"] if found.get("text") else []
    kinds += [name for name in ("tags", "author") if found.get(name)]
    kinds.append("numeric")
    if params.cooccurrence_token and found.get("cooccurrence"):
        kinds.append("cooccurrence")
    return kinds


def _fit_terms(
    views: Mapping[str, sp.csr_matrix], dimension: int, seed: int, *, text: bool = False
) -> dict[str, Array]:
    """Term weights and the projection of each view, decomposed together.

    A projection is ``V / sqrt(s)``, so that a row times it is ``U sqrt(s)``: the square root lets
    middle directions count (the same reference as `ppmi`). Signs are fixed, so equal input gives
    equal output. Projections of text are kept in half precision, in which they are used.
    """
    arrays: dict[str, Array] = {}
    weighed = []
    for name, counts_NF in views.items():
        if text:
            # A term of a single item relates it to nothing, and most terms are such.
            items_F = counts_NF.getnnz(axis=0)
            shared_F = np.flatnonzero(items_F > 1)
            if len(shared_F) > MAX_TERMS:
                frequent = np.argsort(-items_F[shared_F], kind="stable")[:MAX_TERMS]
                shared_F = np.sort(shared_F[frequent])
            counts_NF = counts_NF[:, shared_F]
            arrays[f"{name}.columns"] = shared_F.astype(np.int32)
        known_in = counts_NF.getnnz(axis=0)
        idf_F = (1 + np.log((1 + counts_NF.shape[0]) / (1 + known_in))).astype(np.float32)
        arrays[f"{name}.idf"] = idf_F
        weighed.append(encoder.weigh_terms(counts_NF, idf_F, text=text))
    features_NF = sp.hstack(weighed, format="csr", dtype=np.float32)
    kind = np.float16 if text else np.float32
    if features_NF.nnz:
        _, values, axes_dF = randomized_svd(
            features_NF,
            min(dimension, min(features_NF.shape)),
            n_iter=SVD_ITERATIONS,
            random_state=seed,
            flip_sign=True,
        )
        kept = values > 1e-6 * values[0]
        projection_Fd = (axes_dF[kept] / np.sqrt(values[kept])[:, None]).T
    else:
        projection_Fd = np.zeros((features_NF.shape[1], 1))
    parts = np.split(projection_Fd, np.cumsum([part.shape[1] for part in weighed])[:-1])
    for name, part in zip(views, parts, strict=True):
        arrays[f"{name}.projection"] = np.ascontiguousarray(part, dtype=kind)
    return arrays


def _fit_numbers(items: pa.Table, dimension: int, seed: int) -> dict[str, Array]:
    number_NX = encoder.numbers(items)
    known_NX = np.isfinite(number_NX)
    count_X = np.maximum(1, known_NX.sum(0))
    mean_X = np.where(known_NX, number_NX, 0).sum(0) / count_X
    square_X = np.where(known_NX, number_NX - mean_X, 0) ** 2
    scale_X = np.sqrt(square_X.sum(0) / count_X)
    random = np.random.default_rng(seed)
    return {
        "numeric.mean": mean_X,
        "numeric.scale": np.where(scale_X > 1e-6, scale_X, 1.0),
        "numeric.frequency": random.normal(size=(number_NX.shape[1], dimension)),
        "numeric.phase": random.uniform(0, 2 * np.pi, dimension),
    }


def _fit_ridge(block_Nd: Float, content_Nc: Float) -> dict[str, Array]:
    """Ridge regression of the co-occurrence block on content, from the items that have both."""
    known_N = block_Nd.any(1)
    if not known_N.any():
        return {}
    x = content_Nc[known_N].astype(np.float64)
    gram_cc = x.T @ x + RIDGE * np.eye(x.shape[1])
    weights_cd = np.linalg.solve(gram_cc, x.T @ block_Nd[known_N])
    return {"cooccurrence.ridge": weights_cd.astype(np.float32)}


def _fit_visual(
    visual: VisualFeatures, item_id: pa.ChunkedArray, params: ItemFeaturesParams
) -> tuple[dict[str, Array], int]:
    """PCA of the visual vectors of the catalogue to the width of a token; vectors an item."""
    _, place_V, vector_Vv = visual.of_items(item_id, params.visual_tokens)
    x = vector_Vv.astype(np.float64)
    mean_v = x.mean(0) if len(x) else np.zeros(x.shape[1])
    _, axes_vv = np.linalg.eigh((x - mean_v).T @ (x - mean_v))
    axes_vt = axes_vv[:, ::-1][:, : params.token_dimension]
    axes_vt = axes_vt * np.sign(axes_vt[np.abs(axes_vt).argmax(0), np.arange(axes_vt.shape[1])])
    arrays = {"visual.mean": mean_v.astype(np.float32), "visual.axes": axes_vt.astype(np.float32)}
    return arrays, int(place_V.max(initial=-1)) + 1


def cooccurrence_counts(
    batches: Iterable[pa.RecordBatch], num_items: int, window: int, *, positive_only: bool
) -> sp.csr_matrix:
    """How often two items lie at most ``window`` events apart in a user's sequence.

    Nearer pairs count more (1 / distance). Symmetric, float32 [N, N], no diagonal.

    Args:
        batches: train sequences with the columns ``item_index`` and ``positive``.
    """
    total = sp.csr_matrix((num_items, num_items), dtype=np.float32)
    for batch in batches:
        column = batch.column("item_index")
        length = column.value_lengths().to_numpy(zero_copy_only=False)
        user = np.repeat(np.arange(len(length)), length)
        item = column.flatten().to_numpy()
        if positive_only:
            kept = batch.column("positive").flatten().to_numpy(zero_copy_only=False)
            user, item = user[kept], item[kept]
        for distance in range(1, window + 1):
            left, right = item[:-distance], item[distance:]
            together = (user[:-distance] == user[distance:]) & (left != right)
            weight = np.full(int(together.sum()), 1 / distance, np.float32)
            total = total + sp.csr_matrix(
                (weight, (left[together], right[together])), (num_items, num_items)
            )
    return (total + total.T).tocsr()


def ppmi(counts: sp.csr_matrix, smoothing: float = 0.75) -> sp.csr_matrix:
    """Positive pointwise mutual information, with smoothed context counts (Levy et al. 2015).

    ``max(0, log(P(i, j) / (P(i) · P(j)^smoothing)))``; the exponent keeps rare items from looking
    related to everything.
    """
    pairs = counts.tocoo()
    mass = np.asarray(counts.sum(1), np.float64).ravel()
    if pairs.nnz == 0:
        return counts
    context = mass**smoothing
    context /= context.sum()
    expected = mass[pairs.row] * context[pairs.col]
    information = np.log(pairs.data.astype(np.float64) / expected)
    kept = information > 0
    return sp.csr_matrix(
        (information[kept].astype(np.float32), (pairs.row[kept], pairs.col[kept])), counts.shape
    )


def _reduce_symmetric(features_NN: sp.csr_matrix, dimension: int, seed: int) -> Float:
    """Left singular vectors times the square root of the singular values, rows of unit length.

    An item without any feature keeps a zero row.
    """
    if features_NN.nnz == 0:
        return np.zeros((features_NN.shape[0], 1), np.float32)
    left, values, _ = randomized_svd(
        features_NN,
        min(dimension, min(features_NN.shape)),
        n_iter=SVD_ITERATIONS,
        random_state=seed,
        flip_sign=True,
    )
    known_N = features_NN.getnnz(axis=1) > 0
    return unit_rows(left * np.sqrt(values)) * known_N[:, None].astype(np.float32)


def combine(
    blocks: Sequence[tuple[Float, float]], params: ItemFeaturesParams
) -> tuple[Float, Float]:
    """PCA of weighted blocks side by side: their mean [d] and the rotation [d, D].

    ``(blocks - mean) @ rotation`` has mean 0 and mean variance 1 a dimension: vectors of unit
    length make residual quantisers collapse. ``whitening`` 0 keeps distances, 1 gives all
    dimensions equal variance.
    """
    rows = len(blocks[0][0])
    parts = [slice(start, start + ROWS) for start in range(0, rows, ROWS)]

    def joined(part: slice) -> npt.NDArray[np.float64]:
        return np.concatenate(
            [weight * block[part] for block, weight in blocks], 1, dtype=np.float64
        )

    mean = sum(joined(part).sum(0) for part in parts) / rows
    covariance = sum((x := joined(part) - mean).T @ x for part in parts) / rows
    variance, axes = np.linalg.eigh(covariance)
    order = np.argsort(-variance)[: params.dimension]
    variance, axes = np.maximum(variance[order], 0), axes[:, order]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(len(order))])
    kept = variance > 1e-9 * max(float(variance.max(initial=0)), 1e-30)
    scale = np.where(kept, np.where(kept, variance, 1.0) ** (-params.whitening / 2), 0.0)
    total = float((variance * scale**2).sum()) / len(order)
    scale = scale / max(np.sqrt(total), 1e-12)
    rotation = np.zeros((len(mean), params.dimension))
    rotation[:, : len(order)] = axes * scale
    return mean.astype(np.float32), rotation.astype(np.float32)
