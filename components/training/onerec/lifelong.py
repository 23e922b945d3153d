"""Lifelong history: events replaced by the features of their clusters (arXiv 2506.13695, 2.2).

A user's items are clustered by hierarchical k-means in the content space that semantic ids are
made of: a set of n items is cut into ⌊n^(1/3)⌋ clusters, each of those again, until none has more
than ``leaf`` items. Categorical features of a cluster are those of its representative, the item
nearest its centre; continuous ones are means over its events: the time, the watched share and the
duration on their bucket scales, and the weights of tags, so that the mean of tag embeddings is
exact. The newest ``entries`` events of a request are then read as their clusters.

Clusters may not know the future, and cannot be made anew for every request. So they are made of
*snapshots*: of a user's first ``leaf + 1`` events, then anew whenever the history has grown by a
quarter, or by a fifth of ``entries`` if that is less. A request reads the newest snapshot that ends
before it; the events since then, a fifth of what it reads at most, are read as they are. Which
snapshots there are depends on the number of earlier events alone, so training and serving read the
same of a history that is told whole (of one cut to ``split.max_history`` other snapshots are made),
and a snapshot is made once for all the requests that read it. Snapshots of at most ``leaf`` items
are left as they are.

All members of a cluster have the same features and the pathway's attention has no positions:
instead of many equal states it reads one with the count of its events, whose logarithm is added to
the attention scores. That is the same sum (`LifelongPathway` never sees the copies).

Shapes: E events, U users, N items, D width of the content space, S sets or samples, P points
(items of all sets), n items of a set, k clusters of a set, X entries of all snapshots, K snapshots,
C clusters, B batch, L rows of a request, T tags.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from components.training.onerec.config import LifelongConfig
    from components.training.onerec.data import Sequences
    from components.training.onerec.features import ItemFeatures

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]

#: Lloyd iterations of one cut at most; sets of tens of items settle in four or five.
ITERATIONS = 20
#: Multiples of it, modulo 1, fill the unit interval evenly.
GOLDEN = 0.6180339887498949
#: Numbers of a block of points that are looked at together: 16 MB.
BLOCK = 4_000_000


def hierarchical_kmeans(
    content_ND: Float32, item_P: npt.NDArray[np.integer], start_S1: Int64, leaf: int
) -> Int64:
    """The cluster of every point, many sets at once; a set's clusters depend on it alone.

    Starts are those of k-means++, whose draws are the same low-discrepancy numbers for every set.
    A set that k-means cannot cut, because its items are equal, is cut into equal parts.

    Args:
        item_P: items of all sets; set s is ``start_S1[s] … start_S1[s + 1] - 1``.
        leaf: items of a cluster at most, M; 8 or more, or a set would be cut into one.

    Returns:
        int64 [P], numbered from 0 on, ascending by set. A set of at most ``leaf`` items has one
        cluster an item.
    """
    if leaf < 8:
        raise ValueError(f"leaf {leaf}: sets of fewer than 8 items are never cut")
    points = len(item_P)
    order_P = np.arange(points)
    begins_P = np.zeros(points, bool)
    size_S = np.diff(start_S1)
    begins_P[start_S1[:-1][size_S > 0]] = True
    whole_P = np.repeat(size_S <= leaf, size_S)
    while True:
        first = np.flatnonzero(begins_P)
        size = np.diff(np.append(first, points))
        first, size = first[size > leaf], size[size > leaf]
        if not len(first):
            break
        # Sets of one size are one stack of matrices, each of which is computed alone.
        for n in np.unique(size):
            together = max(1, BLOCK // (int(n) * content_ND.shape[1]))
            starts = first[size == n]
            for low in range(0, len(starts), together):
                place_Sn = starts[low : low + together, None] + np.arange(n)
                held_Sn = order_P[place_Sn]
                label_Sn = _kmeans(content_ND[item_P[held_Sn]], _cube_root(int(n)))
                by_Sn = np.argsort(label_Sn, axis=1, kind="stable")
                order_P[place_Sn] = np.take_along_axis(held_Sn, by_Sn, 1)
                label_Sn = np.take_along_axis(label_Sn, by_Sn, 1)
                begins_P[place_Sn[:, 1:]] = label_Sn[:, 1:] != label_Sn[:, :-1]
    begins_P |= whole_P
    cluster_P = np.empty(points, np.int64)
    cluster_P[order_P] = np.cumsum(begins_P) - 1
    return cluster_P


def _cube_root(n: int) -> int:
    """⌊n^(1/3)⌋, exact."""
    root = round(n ** (1 / 3))
    return root - (root**3 > n)


def _kmeans(x_SnD: Float32, k: int) -> Int64:
    """Labels int64 [S, n] of k-means with ``k`` ≥ 2 centres; two or more are used in every set."""
    sets, n, _ = x_SnD.shape
    every = np.arange(sets)
    centre_SkD = np.empty((sets, k, x_SnD.shape[2]), np.float32)
    centre_SkD[:, 0] = x_SnD[:, int(GOLDEN * n)]
    near_Sn = _distance(x_SnD, centre_SkD[:, 0])
    for j in range(1, k):
        sum_Sn = near_Sn.cumsum(1, dtype=np.float64)
        drawn_S = (sum_Sn < (j + 1) * GOLDEN % 1 * sum_Sn[:, -1:]).sum(1)
        centre_SkD[:, j] = x_SnD[every, drawn_S]
        near_Sn = np.minimum(near_Sn, _distance(x_SnD, centre_SkD[:, j]))
    label_Sn = np.full((sets, n), -1, np.int64)
    for _ in range(ITERATIONS):
        square_Sk = np.einsum("skd,skd->sk", centre_SkD, centre_SkD)
        before_Sn = label_Sn
        label_Sn = (square_Sk[:, None] - 2 * x_SnD @ centre_SkD.transpose(0, 2, 1)).argmin(2)
        if np.array_equal(before_Sn, label_Sn):
            break
        member_Skn = (label_Sn[:, None] == np.arange(k)[:, None]).astype(np.float32)
        count_Sk = member_Skn.sum(2)
        mean_SkD = member_Skn @ x_SnD / np.maximum(count_Sk, 1)[..., None]
        centre_SkD = np.where(count_Sk[..., None] > 0, mean_SkD, centre_SkD)
    uncut_S = (label_Sn == label_Sn[:, :1]).all(1)
    label_Sn[uncut_S] = np.arange(n) * k // n
    return label_Sn


def _distance(x_SnD: Float32, to_SD: Float32) -> Float32:
    """Squared distances of a set's items to one point: [S, n]."""
    apart_SnD = x_SnD - to_SD[:, None]
    return np.einsum("snd,snd->sn", apart_SnD, apart_SnD)


@dataclass(frozen=True)
class LifelongRows:
    """What the lifelong pathway reads of some requests.

    Attributes:
        event_BL: int64, the event whose categorical features a row has (padding: 0).
        cluster_BL: int64, the cluster that its continuous features come from; -1: the event itself.
        count_BL: int64 events that the row stands for; 0 = padding.
    """

    event_BL: Int64
    cluster_BL: Int64
    count_BL: Int64


@dataclass(frozen=True)
class Clusters:
    """Clusters of the snapshots that some requests read.

    Attributes:
        config: how they were made.
        end_K: int64, the event after each snapshot's last, ascending.
        start_K1: int64 [K + 1] into ``cluster_X``, the cluster of every event of a snapshot.
        event_C: int64, the newest event, within the snapshot, of the cluster's representative.
        time_ms_C: int64 mean time.
        watch_C, duration_C: uint8 mean buckets of the events where they are known, else 0.
        tag_start_C1, tag_J, tag_weight_J: tags of each cluster and their weights in its mean.
    """

    config: LifelongConfig
    end_K: Int64
    start_K1: Int64
    cluster_X: Int32
    event_C: Int64
    time_ms_C: Int64
    watch_C: UInt8
    duration_C: UInt8
    tag_start_C1: Int64
    tag_J: Int32
    tag_weight_J: Float32

    def rows(self, start_U1: Int64, event_B: Int64) -> LifelongRows:
        """The newest ``config.entries`` events before each of ``event_B``, as their clusters."""
        begin_B, end_B = _snapshots(start_U1, event_B, self.config)
        oldest_B = np.maximum(begin_B, event_B - self.config.entries)
        snapshot_B = np.searchsorted(self.end_K, end_B)
        is_made_B = np.zeros(len(event_B), bool)
        inside = snapshot_B < len(self.end_K)
        is_made_B[inside] = self.end_K[snapshot_B[inside]] == end_B[inside]
        border_B = np.where(is_made_B, np.maximum(end_B, oldest_B), oldest_B)

        own_B = np.arange(len(event_B)).repeat(event_B - border_B)
        own_event = ranges(border_B, event_B - border_B)
        clustered_B = np.where(is_made_B, border_B - oldest_B, 0)
        row = np.arange(len(event_B)).repeat(clustered_B)
        base_B = oldest_B - begin_B
        base_B[is_made_B] += self.start_K1[snapshot_B[is_made_B]]
        cluster = self.cluster_X[ranges(base_B, clustered_B)].astype(np.int64)
        width = len(self.event_C)
        key, count = np.unique(row * width + cluster, return_counts=True)

        b = np.concatenate([own_B, key // max(1, width)])
        event = np.concatenate([own_event, self.event_C[key % max(1, width)]])
        source = np.concatenate([np.full(len(own_B), -1), key % max(1, width)])
        counts = np.concatenate([np.ones(len(own_B), np.int64), count])
        order = np.argsort(b, kind="stable")
        length_B = np.bincount(b, minlength=len(event_B))
        longest = max(1, int(length_B.max(initial=0)))
        place = b[order] * longest + ranges(np.zeros(len(event_B), np.int64), length_B)

        def padded(values: npt.NDArray[np.int64], filling: int) -> Int64:
            table = np.full(len(event_B) * longest, filling, np.int64)
            table[place] = values[order]
            return table.reshape(len(event_B), longest)

        return LifelongRows(padded(event, 0), padded(source, -1), padded(counts, 0))

    def tags(
        self, cluster_BL: Int64, items: ItemFeatures, item_BL: npt.NDArray[np.integer]
    ) -> tuple[Int32, Float32]:
        """Tags and weights [B, L, T] of clusters, and of an item where there is none (-1)."""
        is_one_BL = cluster_BL < 0
        start_BL = self.tag_start_C1[np.where(is_one_BL, 0, cluster_BL)]
        stop_BL = np.where(is_one_BL, start_BL, self.tag_start_C1[cluster_BL + ~is_one_BL])
        T = items.tag_NT.shape[1]
        place_T = np.arange(max(T, int((stop_BL - start_BL).max(initial=0))))
        inside_BLT = start_BL[..., None] + place_T < stop_BL[..., None]
        index_BLT = np.where(inside_BLT, start_BL[..., None] + place_T, 0)
        tag_BLT = np.append(self.tag_J, np.int32(0))[index_BLT] * inside_BLT
        weight_BLT = np.append(self.tag_weight_J, np.float32(0))[index_BLT] * inside_BLT
        tag_BLT[..., :T] += items.tag_NT[item_BL] * is_one_BL[..., None]
        weight_BLT[..., :T] += items.tag_weight_NT[item_BL] * is_one_BL[..., None]
        return tag_BLT, weight_BLT


def cluster_histories(
    sequences: Sequences, event_S: Int64, items: ItemFeatures, config: LifelongConfig
) -> Clusters:
    """Clusters of every snapshot that requests before the events ``event_S`` read.

    Raises:
        ValueError: ``items`` has no content embedding.
    """
    content_ND = items.content_ND
    if content_ND is None:
        raise ValueError("lifelong clusters need the items' content embedding")
    _, end_S = _snapshots(sequences.start_U1, event_S, config)
    end_K = np.unique(end_S[end_S >= 0])
    begin_K = _begin(sequences.start_U1, end_K - 1)
    N = len(content_ND)

    event_X = ranges(begin_K, end_K - begin_K)
    snapshot_X = np.arange(len(end_K)).repeat(end_K - begin_K)
    key_X = snapshot_X * N + sequences.item_E[event_X]
    key_P, point_X = np.unique(key_X, return_inverse=True)
    items_K = np.bincount(key_P // N, minlength=len(end_K))
    # Snapshots of few items stay events.
    is_cut_K = items_K > config.leaf
    is_cut_P = is_cut_K[key_P // N]
    item_P = key_P[is_cut_P] % N
    is_cut_X = is_cut_P[point_X]
    event_X, point_X = event_X[is_cut_X], (np.cumsum(is_cut_P) - 1)[point_X[is_cut_X]]
    end_K, length_K = end_K[is_cut_K], (end_K - begin_K)[is_cut_K]

    start_P1 = np.concatenate([[0], np.cumsum(items_K[is_cut_K])])
    cluster_P = hierarchical_kmeans(content_ND, item_P, start_P1, config.leaf)
    cluster_X = cluster_P[point_X]
    C = int(cluster_P.max(initial=-1)) + 1

    newest_P = np.zeros(len(item_P), np.int64)
    # Events ascend: of an item's events the newest is written last.
    newest_P[point_X] = event_X
    size_C = np.bincount(cluster_X, minlength=C)
    time_C = np.bincount(cluster_X, sequences.time_ms_E[event_X], C) / np.maximum(size_C, 1)
    tags = _mean_tags(cluster_X, sequences.item_E[event_X], items, C)
    return Clusters(
        config=config,
        end_K=end_K,
        start_K1=np.concatenate([[0], np.cumsum(length_K)]).astype(np.int64),
        cluster_X=cluster_X.astype(np.int32),
        event_C=newest_P[_representatives(content_ND, item_P, cluster_P, C)],
        time_ms_C=np.rint(time_C).astype(np.int64),
        watch_C=_mean_known(cluster_X, sequences.watch_E[event_X], C),
        duration_C=_mean_known(cluster_X, sequences.duration_E[event_X], C),
        tag_start_C1=tags[0],
        tag_J=tags[1],
        tag_weight_J=tags[2],
    )


def _snapshots(start_U1: Int64, event_S: Int64, config: LifelongConfig) -> tuple[Int64, Int64]:
    """First event of each sample's user and the end of the snapshot that it reads (-1: none)."""
    begin_S = _begin(start_U1, event_S)
    before_S = event_S - begin_S
    ends, longest = [config.leaf + 1], before_S.max(initial=0)
    while ends[-1] < longest:
        ends.append(ends[-1] + max(1, min(ends[-1] // 4, config.entries // 5)))
    nth_S = np.searchsorted(ends, before_S, side="right") - 1
    return begin_S, np.where(nth_S < 0, -1, begin_S + np.array(ends)[nth_S])


def _begin(start_U1: Int64, event_S: Int64) -> Int64:
    return start_U1[np.searchsorted(start_U1, event_S, side="right") - 1]


def ranges(first_S: Int64, length_S: Int64) -> Int64:
    """``first … first + length - 1`` of every row, one after the other."""
    ends = np.cumsum(length_S)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(first_S - ends + length_S, length_S) + np.arange(total)


def _representatives(content_ND: Float32, item_P: Int64, cluster_P: Int64, C: int) -> Int64:
    """The point nearest the mean of each cluster, of equally near ones the first: int64 [C]."""
    order_P = np.lexsort((item_P, cluster_P))
    start_C = np.searchsorted(cluster_P[order_P], np.arange(C))
    nearest_C = np.empty(C, np.int64)
    together = max(1, BLOCK // content_ND.shape[1])
    low = 0
    while low < C:
        high = max(low + 1, int(np.searchsorted(start_C, start_C[low] + together)))
        stop = start_C[high] if high < C else len(order_P)
        held = order_P[start_C[low] : stop]
        x_pD = content_ND[item_P[held]]
        within = cluster_P[held] - low
        begin = start_C[low:high] - start_C[low]
        size = np.diff(np.append(begin, len(held)))
        mean = np.add.reduceat(x_pD, begin, axis=0) / size[:, None].astype(np.float32)
        apart = ((x_pD - mean[within]) ** 2).sum(1)
        nearest_C[low:high] = held[np.lexsort((apart, within))[begin]]
        low = high
    return nearest_C


def _mean_known(cluster_X: Int64, bucket_X: UInt8, C: int) -> UInt8:
    known_C = np.bincount(cluster_X, bucket_X > 0, C)
    return np.rint(np.bincount(cluster_X, bucket_X, C) / np.maximum(known_C, 1)).astype(np.uint8)


def _mean_tags(
    cluster_X: Int64, item_X: Int32, items: ItemFeatures, C: int
) -> tuple[Int64, Int32, Float32]:
    """Tags of every cluster with their weights in the mean over its events that have any."""
    tag_XT = items.tag_NT[item_X]
    weight_XT = items.tag_weight_NT[item_X]
    rows = int(items.tag_NT.max(initial=0)) + 1
    real_XT = weight_XT > 0
    key_XT = cluster_X[:, None] * rows + tag_XT
    key, place = np.unique(key_XT[real_XT], return_inverse=True)
    tagged_C = np.bincount(cluster_X, real_XT.any(1), C)
    weight = np.bincount(place, weight_XT[real_XT], len(key)) / tagged_C[key // rows]
    start = np.searchsorted(key, np.arange(C + 1) * rows)
    return start, (key % rows).astype(np.int32), weight.astype(np.float32)
