"""Claims about constrained decoding: exact, legal, shared, and resolved to items."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from onerec_world import ITEMS, World

from components.training.onerec import decode, experts
from components.training.onerec.config import LazyDecoderConfig, MemoryConfig, OneRecConfig
from components.training.onerec.data import Batch, Sequences, assemble, read_sequences
from components.training.onerec.decode import Beams, DeviceTrie, beam_search, score_catalogue
from components.training.onerec.memory import Recall, count_successors
from components.training.onerec.model import OneRec
from components.training.onerec.trie import Trie, build_trie

CONFIG = OneRecConfig(
    codebook_size=16,
    d_model=32,
    heads=4,
    ffn=48,
    short_term=5,
    positive_feedback=8,
    dropout=0.1,
    num_items=ITEMS,
    memory=MemoryConfig(successors=6, events=3, window=2),
)


#: What every claim holds for: the report's decoder, its mixture of experts, the lazy decoder.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": 5, "active_experts": 2, "moe_in": "both"},
    "lazy": {
        "architecture": "lazy_decoder",
        "lazy": LazyDecoderConfig(key_layers=2, key_heads=2, values="own"),
    },
}


def peaked_model(config: OneRecConfig) -> OneRec:
    """Weights so large that probabilities differ by orders of magnitude, as after training."""
    torch.manual_seed(0)
    model = OneRec(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(
    catalogue: tuple[Trie, np.ndarray], world: World, request: pytest.FixtureRequest
) -> OneRec:
    """With a memory of items that have ids of the ragged tree below."""
    model = peaked_model(CONFIG.model_copy(update=ARCHITECTURES[request.param]))
    assert model.memory is not None
    train = read_sequences(world.train.to_batches())
    successors = count_successors(train, train.train_targets("all"), ITEMS, successors=6, window=2)
    model.memory.fill(successors, catalogue[1][:ITEMS])
    return model


@pytest.fixture(scope="module")
def sequences(world: World) -> Sequences:
    return read_sequences(world.valid.to_batches())


@pytest.fixture(scope="module")
def batch(world: World, sequences: Sequences) -> Batch:
    return assemble(sequences, sequences.example_targets()[:9], world.codes_NQ, CONFIG)


@pytest.fixture(scope="module")
def catalogue() -> tuple[Trie, np.ndarray]:
    """A ragged tree: prefixes with one to many children, some ids with several items."""
    rng = np.random.default_rng(0)
    codes = np.minimum(rng.geometric(0.15, (400, 3)) - 1, 15).astype(np.int32)
    return build_trie(codes, rng.integers(0, 50, 400)), codes


@pytest.fixture(scope="module")
def trie(catalogue: tuple[Trie, np.ndarray]) -> DeviceTrie:
    return DeviceTrie.on(catalogue[0])


def test_catalogue_scores_equal_teacher_forcing_each_id_alone(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    scores = score_catalogue(model, trie, batch)
    for leaf in range(0, catalogue[0].num_leaves, 17):
        sid = torch.from_numpy(catalogue[0].leaf_codes()[leaf].astype(np.int64))
        alone = model.sid_log_probs(batch, sid.expand(len(batch), -1)).sum(1)
        assert torch.allclose(scores[:, leaf], alone, atol=1e-4)


def test_catalogue_scores_do_not_depend_on_how_they_are_cut(
    model: OneRec, batch: Batch, trie: DeviceTrie, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = score_catalogue(model, trie, batch)
    monkeypatch.setattr(decode, "SCORE_BYTES", 4 * len(batch) * 128 * 5)  # five nodes at a time
    assert torch.allclose(score_catalogue(model, trie, batch), whole, atol=1e-5)


def test_beam_of_full_width_equals_exhaustive_scoring(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    leaves = catalogue[0].num_leaves
    beams = beam_search(model, trie, batch, width=leaves)
    exact = score_catalogue(model, trie, batch).sort(1, descending=True)
    assert torch.allclose(beams.score_BW, exact.values, atol=1e-5)
    assert sorted(beams.leaf_BW[0].tolist()) == list(range(leaves))


def test_beam_as_wide_as_the_prefixes_is_exact_in_what_it_returns(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    prefixes = len(catalogue[0].code[-2])
    beams = beam_search(model, trie, batch, width=prefixes)
    exact = score_catalogue(model, trie, batch).topk(prefixes, 1)
    assert torch.allclose(beams.score_BW, exact.values, atol=1e-5)
    assert torch.equal(beams.leaf_BW[:, :20], exact.indices[:, :20])


def test_every_width_agrees_with_a_beam_of_plain_loops(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    legal = [tuple(code) for code in catalogue[0].leaf_codes().tolist()]
    z_BSD, mask = model.encode(batch)
    recall = model.recall(batch)
    for width in (1, 3, 10):
        beams = beam_search(model, trie, batch, width)
        for b in range(3):
            live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
            for level in range(3):
                grown = []
                for score, prefix in live:
                    padded = torch.tensor([[*prefix, *[0] * (3 - level)]])
                    request = replace(
                        recall,
                        code_BMQ=recall.code_BMQ[b : b + 1],
                        score_BMQ=recall.score_BMQ[b : b + 1],
                        match_BWM=recall.match_BWM[b : b + 1],
                    )
                    logits = model.level_logits(z_BSD[b : b + 1], mask[b : b + 1], padded, request)[
                        level
                    ]
                    log_p = logits[0].log_softmax(-1).detach()
                    codes = {code[level] for code in legal if code[:level] == prefix}
                    grown += [(score + float(log_p[c]), (*prefix, c)) for c in codes]
                live = sorted(grown, reverse=True)[:width]
            got = [legal[leaf] for leaf in beams.leaf_BW[b].tolist()]
            assert got == [prefix for _, prefix in live]
            assert beams.score_BW[b].tolist() == pytest.approx([s for s, _ in live], abs=1e-4)


def test_best_score_never_falls_with_width_on_average_nor_below_any_in_the_end(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    """For one request it may: children of a second prefix can push the best one's out."""
    widths = (1, 2, 4, 16, 64, len(catalogue[0].code[-2]))
    best = [beam_search(model, trie, batch, width).score_BW[:, 0] for width in widths]
    for narrow, wide in itertools.pairwise(best):
        assert wide.mean() >= narrow.mean() - 1e-6
        assert (best[-1] >= narrow - 1e-5).all()


def test_results_are_legal_sorted_and_without_duplicates(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    beams = beam_search(model, trie, batch, width=40)
    assert ((beams.leaf_BW >= 0) & (beams.leaf_BW < catalogue[0].num_leaves)).all()
    assert all(len(set(row)) == 40 for row in beams.leaf_BW.tolist())
    assert (beams.score_BW.diff(dim=1) <= 0).all()


def test_batch_of_one_equals_batch_of_many(
    world: World, sequences: Sequences, model: OneRec, trie: DeviceTrie
) -> None:
    events = sequences.example_targets()[:8]
    whole = beam_search(model, trie, assemble(sequences, events, world.codes_NQ, CONFIG), 12)
    for b in range(8):
        alone = assemble(sequences, events[b : b + 1], world.codes_NQ, CONFIG)
        one = beam_search(model, trie, alone, 12)
        assert torch.equal(one.leaf_BW[0], whole.leaf_BW[b])
        assert torch.allclose(one.score_BW[0], whole.score_BW[b], atol=1e-5)


def test_shared_keys_and_values_equal_tiled_ones(
    model: OneRec, batch: Batch, catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    """Each beam given its own copy of the encoder's output scores the same."""
    beams = beam_search(model, trie, batch, width=30)
    z_BSD, mask = model.encode(batch)
    leaf_codes = torch.from_numpy(catalogue[0].leaf_codes().astype(np.int64))
    sids = leaf_codes[beams.leaf_BW].flatten(0, 1)
    recall = model.recall(batch)
    tiled_recall = Recall(*(x.repeat_interleave(30, 0) for x in vars(recall).values()))
    logits = model.level_logits(
        z_BSD.repeat_interleave(30, 0), mask.repeat_interleave(30, 0), sids, tiled_recall
    )
    tiled = sum(x.log_softmax(-1).gather(1, s[:, None])[:, 0] for x, s in zip(logits, sids.T))
    assert torch.allclose(tiled.view(len(batch), 30), beams.score_BW, atol=1e-5)


def test_encoder_runs_once_and_its_keys_once_a_layer_whatever_the_width(
    model: OneRec, batch: Batch, trie: DeviceTrie, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, ...]] = []
    if model.lazy_context is not None:
        project = model.lazy_context.project
        project.register_forward_pre_hook(lambda module, x: calls.append(tuple(x[0].shape)))
        beam_search(model, trie, batch, width=50)
        project._forward_pre_hooks.clear()
        assert [shape[0] for shape in calls] == [len(batch)]
        return
    for layer in model.decoder:
        attention = layer.cross_attention  # type: ignore[union-attr]
        original = attention.keys_values

        def counted(x, original=original):  # type: ignore[no-untyped-def]
            calls.append(tuple(x.shape))
            return original(x)

        monkeypatch.setattr(attention, "keys_values", counted)
    beam_search(model, trie, batch, width=50)
    assert len(calls) == len(model.decoder)
    assert all(shape[0] == len(batch) for shape in calls)


def test_a_search_and_a_training_pass_are_graphs_that_never_wait_for_data(
    model: OneRec, batch: Batch, trie: DeviceTrie, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever asked a value of a tensor would break the graph, and on a GPU make the host wait."""

    def search(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        beams = beam_search(model, trie, batch, 7)
        return beams.score_BW, decode.resolve_items(trie, beams, 5)[0]

    def as_on_a_gpu(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        gate_up, down, end = rest
        half = (x.bfloat16(), gate_up.bfloat16(), down.bfloat16(), end)
        return experts.all_experts_at_once(*half).to(x.dtype)

    monkeypatch.setattr(experts, "grouped_experts", as_on_a_gpu)
    scores, items = search(batch)
    compiled_scores, compiled_items = torch.compile(search, backend="eager", fullgraph=True)(batch)
    # A training pass is one as well; experts count their loads within it.
    training = torch.compile(model.train(), backend="eager", fullgraph=True)
    loss = training(batch).sum()
    model.eval()
    torch.compiler.reset()
    assert torch.isfinite(loss)
    assert torch.allclose(compiled_scores, scores, atol=1e-5)
    assert torch.equal(compiled_items, items)


def test_fewer_legal_ids_than_beams_give_short_beams(model: OneRec, batch: Batch) -> None:
    few = DeviceTrie.on(
        build_trie(np.array([[1, 2, 3], [1, 2, 4], [5, 6, 7]]), np.array([3, 2, 1]))
    )
    beams = beam_search(model, few, batch, width=8)
    assert (beams.leaf_BW[:, :3].sort(1).values == torch.arange(3)).all()
    assert (beams.leaf_BW[:, 3:] == -1).all()
    assert torch.isneginf(beams.score_BW[:, 3:]).all()
    items, scores = decode.resolve_items(few, beams, 5)
    assert (items[:, 3:] == -1).all()
    assert torch.isneginf(scores[:, 3:]).all()


def test_dead_ends_of_one_request_never_reach_another(model: OneRec, batch: Batch) -> None:
    """Level one has a code whose only child chain is single: padding of rows must stay dead."""
    lone = np.array([[0, 0, 0], *[[1, i, j] for i in range(10) for j in range(10)]])
    trie = DeviceTrie.on(build_trie(lone, np.ones(101)))
    beams = beam_search(model, trie, batch, width=101)
    assert all(sorted(row) == list(range(101)) for row in beams.leaf_BW.tolist())


def test_items_are_listed_id_by_id_and_most_popular_first(
    catalogue: tuple[Trie, np.ndarray], trie: DeviceTrie
) -> None:
    arrays = catalogue[0]
    rng = np.random.default_rng(1)
    leaf = np.stack([rng.permutation(arrays.num_leaves)[:12] for _ in range(5)])
    score = -np.sort(rng.random((5, 12)).astype(np.float32))
    leaf[4, 9:], score[4, 9:] = -1, -np.inf
    beams = Beams(torch.from_numpy(leaf), torch.from_numpy(score))
    for top_n in (1, 7, 60):
        items, scores = decode.resolve_items(trie, beams, top_n)
        for b in range(5):
            expected = [
                (int(item), float(s))
                for v, s in zip(leaf[b], score[b])
                if v >= 0
                for item in arrays.items[arrays.item_ptr[v] : arrays.item_ptr[v + 1]]
            ][:top_n]
            got = list(zip(items[b].tolist(), scores[b].tolist()))
            assert got[: len(expected)] == expected
            assert all(item == -1 for item, _ in got[len(expected) :])


def test_recommend_lists_every_request_once_in_order(
    world: World, sequences: Sequences, model: OneRec
) -> None:
    trie = DeviceTrie.on(build_trie(world.codes_NQ, world.popularity_N))
    events = sequences.example_targets()

    def lists(batch_size: int) -> np.ndarray:
        parts = decode.recommend(
            model,
            trie,
            sequences,
            events,
            world.codes_NQ,
            width=25,
            top_n=20,
            batch_size=batch_size,
        )
        return np.concatenate([items for items, _ in parts])

    assert lists(70).shape == (70, 20)
    np.testing.assert_array_equal(lists(70), lists(16))
    assert all(len(set(row)) == 20 for row in lists(70).tolist())
