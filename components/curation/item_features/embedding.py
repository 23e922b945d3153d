"""Item embeddings from what an item is (text, tags, author) and from who watched it with what.

Each view is a sparse matrix reduced by a truncated SVD, centred and scaled to the same energy,
weighted and put side by side; a PCA of the whole decorrelates them. Raw unit-norm text vectors
collapse a residual quantiser to few codes; centred, equally scaled views do not.

Nothing dense of size items × items or users × items is ever formed. Co-occurrence counts come from
the training period alone.

Shapes: N items, E events, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp

Float32 = npt.NDArray[np.float32]

MAX_TEXT_FEATURES = 200_000
#: Exponent that tempers the popularity of contexts in PMI: rare items do not win by chance.
CONTEXT_SMOOTHING = 0.75


def text_view(texts: Sequence[str], width: int, seed: int) -> Float32 | None:
    """TF-IDF of words and word pairs, reduced: float32 [N, ≤ width]; None without any text.

    Scripts without spaces between words are cut into characters and their pairs instead.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(text.strip() for text in texts):
        return None
    unspaced = _unspaced_share(texts) > 0.3
    vectorizer = TfidfVectorizer(
        analyzer="char" if unspaced else "word",
        ngram_range=(1, 2),
        min_df=2 if len(texts) > 100 else 1,
        max_features=MAX_TEXT_FEATURES,
        sublinear_tf=True,
        stop_words=None if unspaced else "english",
        dtype=np.float32,
    )
    return _reduced_terms(vectorizer, texts, width, seed)


def tags_view(tags: Sequence[Sequence[str]], width: int, seed: int) -> Float32 | None:
    """TF-IDF of whole tags, reduced: float32 [N, ≤ width]; None without any tag."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    if not any(len(row) for row in tags):
        return None
    vectorizer = TfidfVectorizer(analyzer=list, dtype=np.float32)
    return _reduced_terms(vectorizer, tags, width, seed)


def author_view(author: npt.NDArray[np.int64], width: int, seed: int) -> Float32 | None:
    """Which items share an author, reduced: float32 [N, ≤ width].

    Args:
        author: int64 [N], -1 = unknown. None is returned if no author has two items.
    """
    names, place_N, count = np.unique(author, return_inverse=True, return_counts=True)
    shared = (names >= 0) & (count > 1)
    rows = np.flatnonzero(shared[place_N])
    if not len(rows):
        return None
    column = np.cumsum(shared) - 1
    matrix = sp.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, column[place_N[rows]])),
        (len(author), int(shared.sum())),
    )
    return reduce_sparse(matrix, width, seed)


def cooccurrence_view(
    batches: Iterable[pa.RecordBatch], num_items: int, window: int, width: int, seed: int
) -> Float32 | None:
    """Positive PMI of items within ``window`` events of a user, reduced: float32 [N, ≤ width].

    Args:
        batches: train sequences with the column ``item_index``.
    """
    counts = count_pairs(batches, num_items, window)
    if not counts.nnz:
        return None
    total_N = np.asarray(counts.sum(1), np.float64).ravel()
    smoothed_N = total_N**CONTEXT_SMOOTHING
    pairs = counts.tocoo()
    # PMI against contexts drawn with smoothed popularity.
    expected = total_N[pairs.row] * (smoothed_N[pairs.col] / smoothed_N.sum())
    pmi = np.log(pairs.data / expected)
    keep = pmi > 0
    matrix = sp.csr_matrix(
        (pmi[keep].astype(np.float32), (pairs.row[keep], pairs.col[keep])), counts.shape
    )
    return reduce_sparse(matrix, width, seed, spread=0.5)


def count_pairs(batches: Iterable[pa.RecordBatch], num_items: int, window: int) -> sp.csr_matrix:
    """Symmetric counts of items within ``window`` events of a user, weighted 1 / distance."""
    counts = sp.csr_matrix((num_items, num_items), dtype=np.float64)
    for batch in batches:
        column = batch.column("item_index")
        length = column.value_lengths().to_numpy(zero_copy_only=False)
        item_E = column.flatten().to_numpy().astype(np.int64)
        user_E = np.repeat(np.arange(len(length)), length)
        for distance in range(1, window + 1):
            same = user_E[distance:] == user_E[:-distance]
            first, second = item_E[:-distance][same], item_E[distance:][same]
            weight = np.full(len(first), 1.0 / distance)
            counts = counts + sp.csr_matrix(
                (np.concatenate([weight, weight]), (np.r_[first, second], np.r_[second, first])),
                counts.shape,
            )
    counts.setdiag(0)
    counts.eliminate_zeros()
    return counts


def combine(views: Sequence[tuple[Float32, float]], dimension: int) -> Float32:
    """Centre, scale and weigh the views, decorrelate: float32 [N, ≤ dimension].

    Args:
        views: (matrix [N, D], weight); a view's weight is its share of the squared distance.
    """
    blocks = [np.sqrt(weight) * unit_energy(view) for view, weight in views if weight > 0]
    x_ND = np.concatenate(blocks, 1)
    # The Gram matrix is D × D, so this is cheap whatever the number of items.
    _, vectors = np.linalg.eigh(x_ND.T.astype(np.float64) @ x_ND)
    basis = fix_signs(vectors[:, ::-1][:, :dimension])
    return np.ascontiguousarray(x_ND @ basis.astype(np.float32))


def unit_energy(view_ND: Float32) -> Float32:
    """Centred, with mean squared norm 1 over the items that have the view.

    A row of zeros says that the item lacks the view; it stays at the centre.
    """
    present_N = np.any(view_ND != 0, axis=1)
    out_ND = np.zeros_like(view_ND)
    if present_N.any():
        centred = view_ND[present_N] - view_ND[present_N].mean(0)
        energy = float(np.einsum("nd,nd->n", centred, centred).mean())
        out_ND[present_N] = centred / np.sqrt(energy) if energy > 0 else centred
    return out_ND


def reduce_sparse(matrix: Any, width: int, seed: int, spread: float = 1.0) -> Float32:
    """Left singular vectors times singular values to the power ``spread``: float32 [N, ≤ width]."""
    from sklearn.utils.extmath import randomized_svd

    rank = min(width, min(matrix.shape))
    left, value, _ = randomized_svd(matrix, rank, random_state=seed, flip_sign=False)
    return (fix_signs(left) * value**spread).astype(np.float32)


def fix_signs(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Each column with its largest entry positive: an SVD's signs are otherwise arbitrary."""
    largest = np.abs(vectors).argmax(0)
    return vectors * np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)


def _reduced_terms(
    vectorizer: Any, documents: Sequence[Any], width: int, seed: int
) -> Float32 | None:
    try:
        matrix = vectorizer.fit_transform(documents)
    except ValueError:
        # Nothing but stop words: no term is left to tell items apart.
        return None
    return reduce_sparse(matrix, width, seed)


def _unspaced_share(texts: Sequence[str]) -> float:
    """Share of characters of scripts that do not part words by spaces (CJK, kana, Thai)."""
    sample = "".join(texts[:2000])[:200_000]
    letters = [c for c in sample if not c.isspace()]
    unspaced = sum("\u0e00" <= c <= "\u0e7f" or "\u3040" <= c <= "\u9fff" for c in letters)
    return unspaced / max(1, len(letters))
