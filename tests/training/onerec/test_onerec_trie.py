"""Claims about the array trie and the shuffled-id control."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.training.onerec.trie import Trie, build_trie, shuffle_sids


def random_codes(seed: int, items: int = 300, codes: int = 6, levels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, codes, (items, levels)).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 9), st.integers(1, 4))
def test_walking_the_trie_visits_every_legal_id_and_no_other(
    seed: int, items: int, codes: int, levels: int
) -> None:
    codes_NQ = random_codes(seed, items, codes, levels)
    trie = build_trie(codes_NQ, np.ones(items))

    def walk(depth: int, node: int, prefix: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        if depth == levels:
            return [(prefix, node)]
        first, last = trie.child_ptr[depth][node : node + 2]
        assert last > first, "an inner node without children leads to no legal id"
        return [
            leaf
            for child in range(first, last)
            for leaf in walk(depth + 1, child, (*prefix, int(trie.code[depth][child])))
        ]

    leaves = walk(0, 0, ())
    assert [node for _, node in leaves] == list(range(trie.num_leaves))
    assert [prefix for prefix, _ in leaves] == sorted({tuple(c) for c in codes_NQ.tolist()})
    assert trie.leaf_codes().tolist() == [list(prefix) for prefix, _ in leaves]


def test_leaf_holds_its_items_by_falling_popularity() -> None:
    codes_NQ = random_codes(0, codes=3)
    popularity = np.random.default_rng(1).integers(0, 5, len(codes_NQ))
    trie = build_trie(codes_NQ, popularity)
    assert sorted(trie.items.tolist()) == list(range(len(codes_NQ)))
    for leaf, code in enumerate(trie.leaf_codes().tolist()):
        items = trie.items[trie.item_ptr[leaf] : trie.item_ptr[leaf + 1]].tolist()
        owners = [i for i, c in enumerate(codes_NQ.tolist()) if c == code]
        assert items == sorted(owners, key=lambda i: (-popularity[i], i))


def test_arrays_round_trip() -> None:
    trie = build_trie(random_codes(2), np.arange(300))
    back = Trie.from_arrays({name: array.copy() for name, array in trie.to_arrays().items()})
    assert back.num_levels == 3
    for name, array in trie.to_arrays().items():
        np.testing.assert_array_equal(back.to_arrays()[name], array)


def test_a_hundred_thousand_items_take_no_loop_over_items() -> None:
    codes_NQ = random_codes(0, items=100_000, codes=8192)
    trie = build_trie(codes_NQ, np.zeros(100_000))
    assert trie.num_leaves == len(np.unique(codes_NQ, axis=0))
    assert trie.fan_out(0) == len(np.unique(codes_NQ[:, 0]))


def test_empty_catalogue_and_too_wide_tuples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        build_trie(np.zeros((0, 3), np.int32), np.zeros(0))
    with pytest.raises(ValueError, match="63 bits"):
        build_trie(np.full((1, 5), 2**20), np.zeros(1))


def test_shuffled_ids_keep_the_trie_and_the_strata_but_change_owners() -> None:
    codes_NQ = random_codes(3, items=2000, codes=9)
    popularity = (np.random.default_rng(0).pareto(1.0, 2000) * 5).astype(np.int64)
    shuffled = shuffle_sids(codes_NQ, popularity, seed=1)
    before, after = (build_trie(c, popularity) for c in (codes_NQ, shuffled))
    for a, b in zip(before.code, after.code):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(before.item_ptr, after.item_ptr)
    stratum = np.floor(np.log2(1 + popularity))
    for s in np.unique(stratum):
        mine = stratum == s
        assert sorted(codes_NQ[mine].tolist()) == sorted(shuffled[mine].tolist())
    assert (codes_NQ != shuffled).any(1).mean() > 0.9
    np.testing.assert_array_equal(shuffled, shuffle_sids(codes_NQ, popularity, seed=1))
