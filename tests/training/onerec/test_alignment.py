"""Alignment of items: the losses against their definitions, and what is learned of pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from components.training.onerec.config import AlignmentConfig, CaptionConfig
from components.training.onerec.tokenizer import alignment
from components.training.onerec.tokenizer.alignment import (
    Aligner,
    ItemTokens,
    align,
    contrastive_loss,
    hold_out,
    retrieval_recall,
)
from components.training.onerec.tokenizer.captions import (
    END,
    PADDING,
    CaptionDecoder,
    caption_ids,
)

WORDS = CaptionConfig(words=64, length=4, width=16, heads=2, items=16)
SMALL = AlignmentConfig(queries=2, width=16, heads=2, states=16, steps=120, pairs=64, caption=WORDS)
GROUPS, PER_GROUP, WIDTH, TELLING = 60, 8, 24, 6


def test_loss_is_the_cross_entropy_of_scaled_cosines() -> None:
    left, right = torch.randn(2, 6, 5)
    item = torch.arange(6)
    expected = F.cross_entropy(
        F.cosine_similarity(left[:, None], right[None], dim=2) / 0.07, torch.arange(6)
    )
    torch.testing.assert_close(contrastive_loss(left, right, item, item + 6, 0.07), expected)


def test_loss_of_constant_embeddings_is_the_logarithm_of_the_batch() -> None:
    same = torch.ones(7, 5)
    loss = contrastive_loss(same, same, torch.arange(7), torch.arange(7) + 7, 0.07)
    assert float(loss) == pytest.approx(math.log(7), rel=1e-6)


def test_a_pairs_own_items_are_never_its_negatives() -> None:
    left_item, right_item = torch.tensor([0, 1, 2]), torch.tensor([5, 5, 0])
    item = torch.randn(6, 4)
    left, right = item[left_item], item[right_item]
    score = F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / 0.1
    # Row 0: pair 1 has the same right item, pair 2's right item is this pair's left one.
    rows = [score[0, :1], score[1, [1, 2]], score[2]]
    places = [0, 0, 2]
    expected = sum(
        F.cross_entropy(row[None], torch.tensor([place]))
        for row, place in zip(rows, places, strict=True)
    )
    loss = contrastive_loss(left, right, left_item, right_item, 0.1)
    torch.testing.assert_close(loss, expected / 3)


def test_hidden_tokens_change_nothing_and_no_token_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = Aligner(3, 8, SMALL)
    token = torch.randn(4, 3, 8)
    mask = torch.tensor([[True, True, False]] * 4)
    other = token.clone()
    other[:, 2] = 100.0
    torch.testing.assert_close(model(token, mask), model(other, mask))
    nothing = model(token, torch.zeros_like(mask))
    assert torch.isfinite(nothing).all()
    torch.testing.assert_close(nothing[0], nothing[3])


def test_words_are_ids_that_end_and_scripts_without_spaces_are_characters() -> None:
    ids = caption_ids(["Red, red shoes", "", "红色鞋", "a b c d e f"], WORDS)
    assert ids.shape == (4, 5)
    assert ids[0, 0] == ids[0, 1] != ids[0, 2]
    assert ids[0, 3:].tolist() == [END, PADDING]
    assert (ids[1] == PADDING).all()
    assert ids[2, 3:].tolist() == [END, PADDING]
    assert ids[3, 4] == END
    assert int(ids.max()) < 2 + WORDS.words


@torch.no_grad()
def test_caption_loss_is_the_likelihood_of_each_word_given_those_before() -> None:
    torch.manual_seed(0)
    decoder = CaptionDecoder(2, 16, WORDS).eval()
    compressed, ids = torch.randn(3, 2, 16), caption_ids(["one two three", "", "four"], WORDS)
    total, words = 0.0, 0
    for row, word_T in enumerate(ids.tolist()):
        for place, word in enumerate(word_T):
            if word == PADDING:
                continue
            # Only the words before stand in the input: a decoder that looks ahead would differ.
            seen = torch.tensor([word_T[:place] + [PADDING] * (5 - place)])
            seen[0, place] = word
            alone = decoder(compressed[row : row + 1], seen) * (place + 1)
            before = 0.0
            if place:
                cut = torch.tensor([word_T[:place] + [PADDING] * (5 - place)])
                before = decoder(compressed[row : row + 1], cut) * place
            total += float(alone - before)
            words += 1
    assert words == 6
    assert float(decoder(compressed, ids)) == pytest.approx(total / words, rel=1e-4)
    assert float(decoder(compressed[1:2], ids[1:2])) == 0


def world(seed: int = 0) -> tuple[ItemTokens, np.ndarray]:
    """Items whose second token tells their group in a few directions, quieter than all others.

    Pairs are of one group. What brings the items of a pair together can be learned of other items
    of other pairs: the directions in which tokens tell groups are the same for all.
    """
    random = torch.Generator().manual_seed(seed)
    group = torch.arange(GROUPS).repeat_interleave(PER_GROUP)
    token = torch.randn(len(group), 2, WIDTH, generator=random)
    signal = torch.randn(GROUPS, TELLING, generator=random)[group]
    token[:, 1, :TELLING] = signal + 0.2 * token[:, 1, :TELLING]
    rng = np.random.default_rng(seed)
    left = rng.integers(0, len(group), 4000)
    right = left // PER_GROUP * PER_GROUP + rng.integers(0, PER_GROUP, 4000)
    pairs = np.stack([left, right], 1)[left != right]
    titles = [f"group{g} item" for g in group.tolist()]
    items = ItemTokens(
        F.normalize(token, dim=2), torch.ones(len(group), 2, dtype=torch.bool),
        caption_ids(titles, WORDS),
    )  # fmt: skip
    return items, pairs


def unseen(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of the first three quarters of the groups, and of the others: new items altogether."""
    last = GROUPS * PER_GROUP * 3 // 4
    return pairs[(pairs < last).all(1)], pairs[(pairs >= last).all(1)]


def embedded(items: ItemTokens, pairs: np.ndarray) -> Tensor:
    return align(items, pairs, SMALL, seed=0).embed(items.token_NMt, items.mask_NM)


def test_alignment_finds_pairs_of_items_it_never_saw_and_shuffled_pairs_teach_nothing() -> None:
    items, pairs = world()
    learned, measured = unseen(pairs)
    raw = retrieval_recall(items.token_NMt.flatten(1), measured)
    aligned = retrieval_recall(embedded(items, learned), measured)
    shuffled = np.stack([learned[:, 0], np.random.default_rng(0).permutation(learned[:, 1])], 1)
    control = retrieval_recall(embedded(items, shuffled), measured)
    assert aligned > 3 * raw
    assert control < 1.5 * raw


def test_losses_fall_and_captions_can_be_left_out() -> None:
    items, pairs = world()
    told: list[dict[str, float]] = []
    align(items, pairs, SMALL, seed=0, log=lambda metrics, step: told.append(dict(metrics)))
    for name in ("alignment_loss", "caption_loss"):
        assert told[-1][name] < 0.9 * told[0][name]
    nameless = ItemTokens(
        items.token_NMt, items.mask_NM, caption_ids([""] * len(items.mask_NM), WORDS)
    )
    without = SMALL.model_copy(update={"caption": WORDS.model_copy(update={"weight": 0.0})})
    for given, config in ((nameless, SMALL), (items, without)):
        told.clear()
        align(given, pairs, config.model_copy(update={"steps": 3}), 0, lambda m, s: told.append(m))
        assert set(told[-1]) == {"alignment_loss"}


def test_same_seed_gives_the_same_weights() -> None:
    items, pairs = world()
    short = SMALL.model_copy(update={"steps": 5})
    one, again, other = (align(items, pairs, short, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["project.weight"], other["project.weight"])


def test_a_pair_that_is_given_many_times_is_learned_as_many_pairs() -> None:
    items, pairs = world()
    times = np.random.default_rng(0).integers(0, 4, len(pairs))
    times[0] = 157
    short = SMALL.model_copy(update={"steps": 3})
    weighed = align(items, pairs, short, seed=0, times_P=times.astype(np.float64)).state_dict()
    repeated = align(items, np.repeat(pairs, times, axis=0), short, seed=0).state_dict()
    once = align(items, pairs, short, seed=0).state_dict()
    assert all(torch.equal(weighed[name], repeated[name]) for name in weighed)
    assert not torch.equal(weighed["project.weight"], once["project.weight"])


def test_embeddings_that_are_all_alike_find_nothing() -> None:
    pairs = np.random.default_rng(0).integers(0, 60, (80, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    assert retrieval_recall(torch.ones(60, 5), pairs) == 0
    # The ten nearest of eleven are all others.
    assert retrieval_recall(torch.ones(11, 5), np.array([[0, 5], [3, 10]])) == 1


def test_no_held_out_pair_is_learned_in_either_direction() -> None:
    _, pairs = world()
    both = np.concatenate([pairs, pairs[:, ::-1]])
    is_measured = hold_out(both, 0.2, seed=0)
    learned, measured = both[~is_measured], both[is_measured]
    assert len(learned) + len(measured) == len(both)
    assert 0.1 < len(measured) / len(both) < 0.3
    known = {frozenset(pair) for pair in learned.tolist()}
    assert not known & {frozenset(pair) for pair in measured.tolist()}


def test_recall_equals_a_full_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, 5)
    pairs = np.random.default_rng(0).integers(0, 60, (80, 2))
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    near = F.cosine_similarity(x[:, None], x[None], dim=2).fill_diagonal_(-2)
    hits = [right in near[left].topk(10).indices.tolist() for left, right in pairs.tolist()]
    assert retrieval_recall(x, pairs) == pytest.approx(np.mean(hits))
    monkeypatch.setattr(alignment, "RECALL_PAIRS", 10)
    assert 0 <= retrieval_recall(x, pairs) <= 1
