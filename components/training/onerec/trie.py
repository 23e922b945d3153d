"""The legal semantic ids as arrays: a prefix tree without objects, and the items of every leaf.

Legal means: at least one item has it (arXiv 2506.13695, section 2.1). Sorting the legal tuples
makes the children of a node one contiguous range of the next depth's nodes, so a decoding step is
a gather over ranges. Built by NumPy alone: a million items take about a second.

Shapes: N items, Q levels, V(l) nodes at depth l (V(0) = 1, the root; V(Q) = leaves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Trie:
    """Prefix tree over the legal semantic ids; a leaf *is* the rank of its id in sorted order.

    Attributes:
        child_ptr: for each depth l < Q int32 [V(l) + 1]: the children of node v are the nodes
            ``child_ptr[l][v] … child_ptr[l][v + 1] - 1`` of depth l + 1.
        code: for each depth l = 1..Q int32 [V(l)]: last code of the node (``code[l - 1]``);
            ascending among the children of a node.
        item_ptr: int32 [V(Q) + 1] and
        items: int32 [N]: items of leaf v are ``items[item_ptr[v]:item_ptr[v + 1]]``, most popular
            first.
    """

    child_ptr: tuple[Int32, ...]
    code: tuple[Int32, ...]
    item_ptr: Int32
    items: Int32

    @property
    def num_levels(self) -> int:
        return len(self.code)

    @property
    def num_leaves(self) -> int:
        return len(self.item_ptr) - 1

    def fan_out(self, depth: int) -> int:
        """Most children that a node of this depth has."""
        return int(np.diff(self.child_ptr[depth]).max())

    def leaf_codes(self) -> Int32:
        """All legal semantic ids in sorted order: int32 [V(Q), Q]."""
        codes = self.code[-1][:, None]
        for depth in range(self.num_levels - 1, 0, -1):
            count = np.diff(self.child_ptr[depth])
            above = np.repeat(self.code[depth - 1], count)
            # `codes` has a row a leaf: widen the parents of depth + 1 down to the leaves.
            for below in range(depth + 1, self.num_levels):
                above = np.repeat(above, np.diff(self.child_ptr[below]))
            codes = np.concatenate([above[:, None], codes], axis=1)
        return codes

    def to_arrays(self) -> dict[str, Int32]:
        """Named arrays, e.g. for safetensors."""
        arrays = {"item_ptr": self.item_ptr, "items": self.items}
        arrays |= {f"child_ptr.{depth}": ptr for depth, ptr in enumerate(self.child_ptr)}
        return arrays | {f"code.{depth}": code for depth, code in enumerate(self.code, 1)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray]) -> Trie:
        """The tree of `to_arrays`."""
        levels = sum(name.startswith("code.") for name in arrays)
        return cls(
            tuple(arrays[f"child_ptr.{depth}"] for depth in range(levels)),
            tuple(arrays[f"code.{depth}"] for depth in range(1, levels + 1)),
            arrays["item_ptr"],
            arrays["items"],
        )


def build_trie(codes_NQ: npt.NDArray[np.integer], popularity_N: npt.NDArray[np.integer]) -> Trie:
    """The tree of all items' semantic ids.

    Args:
        codes_NQ: codes of every item, each in 0..K-1.
        popularity_N: training popularity; orders items of one id (equal: by index).

    Raises:
        ValueError: no item, or codes so large that a tuple does not fit 63 bits.
    """
    N, Q = codes_NQ.shape
    if N == 0:
        raise ValueError("a trie needs at least one item")
    base = int(codes_NQ.max()) + 1
    if Q * (base - 1).bit_length() > 63:
        raise ValueError(f"{Q} levels of {base} codes do not fit 63 bits")
    bits = max(1, (base - 1).bit_length())
    key_N = np.zeros(N, np.int64)
    for level in range(Q):
        key_N = key_N << bits | codes_NQ[:, level].astype(np.int64)
    order_N = np.lexsort((-popularity_N.astype(np.int64), key_N))
    key_V, first_V = np.unique(key_N[order_N], return_index=True)
    child_ptr: list[Int32] = []
    code: list[Int32] = []
    for _ in range(Q):
        code.append((key_V & ((1 << bits) - 1)).astype(np.int32))
        parent_V = key_V >> bits
        key_V, first_child = np.unique(parent_V, return_index=True)
        child_ptr.append(np.append(first_child, len(parent_V)).astype(np.int32))
    return Trie(
        tuple(reversed(child_ptr)),
        tuple(reversed(code)),
        np.append(first_V, N).astype(np.int32),
        order_N.astype(np.int32),
    )


def shuffle_sids(
    codes_NQ: npt.NDArray[np.integer], popularity_N: npt.NDArray[np.integer], seed: int
) -> npt.NDArray[np.integer]:
    """The control that asks whether a model uses semantics: items trade their semantic ids.

    Items trade only within their stratum of popularity (equal ``⌊log2(1 + count)⌋``), so that the
    codebooks, the legal ids, the collisions and how often each id is a target stay about as they
    were; only what an id says of its item is lost.
    """
    stratum_N = np.frexp(popularity_N.astype(np.float64) + 1)[1]
    random_N = np.random.default_rng(seed).random(len(stratum_N))
    place_N = np.argsort(stratum_N, kind="stable")
    taker_N = np.lexsort((random_N, stratum_N))
    shuffled_NQ = np.empty_like(codes_NQ)
    shuffled_NQ[place_N] = codes_NQ[taker_N]
    return shuffled_NQ
