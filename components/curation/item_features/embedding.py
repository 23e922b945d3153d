"""Item embeddings from text, tags, author and train-only co-occurrence.

Each source of knowledge becomes a block: a sparse item × feature matrix, decomposed by a
randomised SVD into a few dimensions, with unit rows where the item is known to that source and
zero rows where it is not. Blocks are weighted, concatenated and rotated by PCA. A missing
co-occurrence block (new items) is predicted from the content blocks by ridge regression, so that a
new item lies near what it resembles instead of near all other new items.

Nothing dense is larger than items × block width; item × item counts stay sparse.

Shapes: N items, F features of a block, d width of a block, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.utils.extmath import randomized_svd

from components.curation.item_features.config import ItemFeaturesParams

Float = npt.NDArray[np.float32]

#: Hashed features: memory does not grow with the vocabulary, and no vocabulary has to be kept.
TEXT_FEATURES = 2**18
SVD_ITERATIONS = 4
RIDGE = 1.0
#: Items rotated at a time.
ROWS = 65_536


def text_features(titles: Sequence[str], captions: Sequence[str]) -> sp.csr_matrix:
    """TF-IDF of words and word pairs, and of character n-grams of the title: float32 [N, F].

    Character n-grams serve scripts without spaces, spelling variants and model numbers; they are
    taken of the caption only where there is no title, since they are many.
    """
    words = HashingVectorizer(
        ngram_range=(1, 2), n_features=TEXT_FEATURES, alternate_sign=False, norm=None
    )
    characters = HashingVectorizer(
        analyzer="char_wb",
        ngram_range=(3, 4),
        n_features=TEXT_FEATURES,
        alternate_sign=False,
        norm=None,
    )
    pairs = list(zip(titles, captions, strict=True))
    parts = []
    for counts in (
        words.transform(f"{title}\n{caption}" for title, caption in pairs),
        characters.transform(title or caption for title, caption in pairs),
    ):
        # A term of a single item relates it to nothing, and most terms are such.
        shared = counts[:, np.flatnonzero(counts.getnnz(axis=0) > 1)]
        if shared.shape[1]:
            parts.append(TfidfTransformer(sublinear_tf=True).fit_transform(shared))
    if not parts:
        return sp.csr_matrix((len(titles), 1), dtype=np.float32)
    return sp.hstack(parts, format="csr", dtype=np.float32)


def tag_features(tags: pa.ChunkedArray) -> sp.csr_matrix:
    """TF-IDF of tags, one column a tag: float32 [N, F]."""
    column = tags.combine_chunks()
    length = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return _tfidf(np.repeat(np.arange(len(column)), length), column.flatten(), len(column))


def author_features(authors: pa.ChunkedArray) -> sp.csr_matrix:
    """One column an author who has at least two items; others say nothing: float32 [N, F]."""
    column = authors.combine_chunks()
    known = np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False))
    features = _tfidf(known, column.drop_null(), len(column))
    several = np.flatnonzero(features.getnnz(axis=0) > 1)
    return features[:, several]


def _tfidf(row: npt.NDArray[np.int64], values: pa.Array, rows: int) -> sp.csr_matrix:
    encoded = values.dictionary_encode()
    keep = encoded.indices.is_valid().to_numpy(zero_copy_only=False)
    column = encoded.indices.drop_null().to_numpy()
    shape = (rows, max(1, len(encoded.dictionary)))
    counts = sp.csr_matrix((np.ones(len(column), np.float32), (row[keep], column)), shape)
    return TfidfTransformer(norm=None).fit_transform(counts).astype(np.float32)


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


def reduce(features: sp.csr_matrix, dimension: int, seed: int) -> Float:
    """Left singular vectors times the square root of the singular values, rows of unit length.

    The square root lets middle directions count (the same reference as `ppmi`). An item without
    any feature keeps a zero row. Signs are fixed, so equal input gives equal output.
    """
    dimension = min(dimension, min(features.shape))
    if features.nnz == 0:
        return np.zeros((features.shape[0], 1), np.float32)
    left, values, _ = randomized_svd(
        features, dimension, n_iter=SVD_ITERATIONS, random_state=seed, flip_sign=True
    )
    known = features.getnnz(axis=1) > 0
    return _unit_rows(left * np.sqrt(values)) * known[:, None].astype(np.float32)


def _unit_rows(block: npt.NDArray) -> Float:
    norm = np.linalg.norm(block, axis=1, keepdims=True)
    return (block / np.maximum(norm, 1e-12)).astype(np.float32)


def predict_missing(block_Nd: Float, content_Nc: Float) -> Float:
    """Fills zero rows of a block by ridge regression on the content of the other rows."""
    missing = ~block_Nd.any(1) & content_Nc.any(1)
    known = block_Nd.any(1)
    if not missing.any() or not known.any():
        return block_Nd
    x = content_Nc[known].astype(np.float64)
    weights = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ block_Nd[known])
    filled = block_Nd.copy()
    filled[missing] = _unit_rows(content_Nc[missing] @ weights)
    return filled


def combine(blocks: Sequence[tuple[Float, float]], params: ItemFeaturesParams) -> Float:
    """Weighted blocks side by side, rotated by PCA to ``params.dimension`` columns.

    The result has mean 0 and mean variance 1 a dimension: vectors of unit length make residual
    quantisers collapse. ``whitening`` 0 keeps distances, 1 gives all dimensions equal variance.
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
    embedding = np.zeros((rows, params.dimension), np.float32)
    for part in parts:
        embedding[part, : len(order)] = (joined(part) - mean) @ axes * scale
    return embedding


def embed(
    titles: Sequence[str],
    captions: Sequence[str],
    tags: pa.ChunkedArray,
    authors: pa.ChunkedArray,
    train_batches: Iterable[pa.RecordBatch],
    params: ItemFeaturesParams,
    seed: int,
) -> tuple[Float, dict[str, int]]:
    """Item embeddings and how many items each block knows.

    Args:
        titles, captions: of each item, in the order of the catalogue; "" where unknown.
        tags: list of strings of each item.
        authors: int64 or null.
        train_batches: train sequences, nothing later.

    Returns:
        float32 [N, D], and ``{block: items it knows}``.
    """
    width = params.block_dimension
    sources = {
        "text": (params.text_weight, lambda: text_features(titles, captions)),
        "tags": (params.tags_weight, lambda: tag_features(tags)),
        "author": (params.author_weight, lambda: author_features(authors)),
    }
    known: dict[str, int] = {}
    content: list[tuple[Float, float]] = []
    for name, (weight, build) in sources.items():
        if weight > 0:
            block = reduce(build(), width, seed)
            known[name] = int(block.any(1).sum())
            content.append((block, weight))
    blocks = list(content)
    if params.cooccurrence_weight > 0:
        counts = cooccurrence_counts(
            train_batches, len(titles), params.window, positive_only=params.positive_only
        )
        block = reduce(ppmi(counts), width, seed)
        known["cooccurrence"] = int(block.any(1).sum())
        if content:
            joined = np.concatenate([weight * part for part, weight in content], axis=1)
            block = predict_missing(block, joined)
        blocks.append((block, params.cooccurrence_weight))
    return combine(blocks, params), known
