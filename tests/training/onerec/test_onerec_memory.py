"""Claims about the successor memory: what it counts, what a sample may see of it, how it blends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from onerec_world import ITEMS, World

from components.training.onerec import memory
from components.training.onerec.config import MemoryConfig, OneRecConfig, TrainConfig
from components.training.onerec.data import Batch, Sequences, assemble, read_sequences
from components.training.onerec.memory import (
    Recall,
    SuccessorMemory,
    Successors,
    count_successors,
    deal_folds,
)
from components.training.onerec.model import OneRec
from components.training.onerec.train import TrainingData, remember, train

#: So many successors are kept that none is cut off.
CONFIG = OneRecConfig(
    codebook_size=16,
    d_model=16,
    heads=2,
    ffn=16,
    feature_width=4,
    short_term=5,
    positive_feedback=4,
    num_items=ITEMS,
    memory=MemoryConfig(successors=ITEMS, events=4, window=3),
)


@pytest.fixture(scope="module")
def sequences(world: World) -> Sequences:
    return read_sequences(world.train.to_batches())


def by_hand(world: World, which: str) -> Counter:
    """Weights of (item, successor) by plain loops."""
    pairs: Counter = Counter()
    for row in world.train.to_pylist():
        for place in range(1, len(row["item_index"])):
            if which == "positive" and not row["positive"][place]:
                continue
            for distance in range(1, min(3, place) + 1):
                source = row["item_index"][place - distance]
                pairs[source, row["item_index"][place]] += 0.5 ** (distance - 1)
    return pairs


@pytest.mark.parametrize("which", ["positive", "all"])
def test_counts_equal_plain_loops(
    world: World, sequences: Sequences, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CHUNK_TARGETS", 100)
    targets = sequences.train_targets(which)  # type: ignore[arg-type]
    found = count_successors(sequences, targets, ITEMS, successors=ITEMS, window=3)
    expected = by_hand(world, which)
    got = {
        (source, int(item)): float(weight)
        for source in range(ITEMS)
        for item, weight in zip(found.item_NR[source], found.weight_NR[source], strict=True)
        if item >= 0
    }
    assert got == dict(expected)
    totals = [sum(w for (s, _), w in expected.items() if s == source) for source in range(ITEMS)]
    assert found.total_N.tolist() == totals


def test_the_strongest_successors_are_kept_strongest_first(sequences: Sequences) -> None:
    targets = sequences.train_targets("all")
    whole = count_successors(sequences, targets, ITEMS, successors=ITEMS, window=3)
    few = count_successors(sequences, targets, ITEMS, successors=5, window=3)
    np.testing.assert_array_equal(few.item_NR, whole.item_NR[:, :5])
    np.testing.assert_array_equal(few.total_N, whole.total_N)
    assert (np.diff(whole.weight_NR, axis=1) <= 0).all()


def recalled(recall: Recall, b: int) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Ids and scores of one request's recalled items, in a fixed order."""
    real = torch.isfinite(recall.score_BMQ[b, :, 0])
    codes, scores = recall.code_BMQ[b, real].tolist(), recall.score_BMQ[b, real].tolist()
    return sorted((tuple(c), tuple(s)) for c, s in zip(codes, scores, strict=True))


@pytest.mark.parametrize("by_time", [True, False])
def test_in_training_a_sample_recalls_what_its_fold_may_know_and_nothing_else(
    world: World, sequences: Sequences, by_time: bool
) -> None:
    """Oracle: a serving memory that never counted anything else, few successors kept."""
    config = CONFIG.model_copy(update={"memory": MemoryConfig(successors=3, events=4, window=3)})
    targets = sequences.train_targets("all")
    folds = deal_folds(sequences, targets, by_time=by_time, seed=0)
    user_E = np.repeat(np.arange(sequences.num_users), np.diff(sequences.start_U1))

    def counted(known: np.ndarray) -> Successors:
        return count_successors(sequences, known, ITEMS, successors=3, window=3)

    module = SuccessorMemory(config)
    torch.manual_seed(0)
    for table in module.parameters():
        torch.nn.init.normal_(table)
    module.fill(counted(targets), world.codes_NQ)
    module.practise_on([counted(folds.known_to(f, targets)) for f in range(memory.FOLDS)])
    batch = assemble(sequences, targets[::37], world.codes_NQ, config, folds.fold_E)
    recall = module.train()(batch)
    seen = 0
    for b, event in enumerate(targets[::37]):
        if by_time:
            now = sequences.time_ms_E[event]
            edge = sequences.time_ms_E[targets[folds.fold_E[targets] == folds.fold_E[event]]].min()
            known = targets[sequences.time_ms_E[targets] < edge]
            assert edge <= now
        else:
            known = targets[folds.fold_E[targets] != folds.fold_E[event]]
            assert user_E[event] not in user_E[known]
        module.fill(counted(known), world.codes_NQ)
        alone = assemble(sequences, np.array([event]), world.codes_NQ, config)
        assert recalled(recall, b) == recalled(module.eval()(alone), 0)
        seen += len(recalled(recall, b))
    assert seen > 50
    # What serves keeps no tables of training: of 3 successors 28 bytes an item, and its codes.
    module.drop_practice()
    assert sum(buffer.nbytes for buffer in module.buffers()) == (28 + 12) * ITEMS


def test_folds_are_about_equal_and_every_one_is_known_to_some(sequences: Sequences) -> None:
    targets = sequences.train_targets("all")
    for by_time in (True, False):
        folds = deal_folds(sequences, targets, by_time=by_time, seed=0)
        sizes = np.bincount(folds.fold_E[targets], minlength=memory.FOLDS)
        assert sizes.min() > len(targets) / memory.FOLDS / 3
        known = [len(folds.known_to(f, targets)) for f in range(memory.FOLDS)]
        expected = np.append(0, np.cumsum(sizes))[:-1] if by_time else len(targets) - sizes
        assert known == list(expected)


def test_serving_looks_at_neither_target_nor_fold(world: World, sequences: Sequences) -> None:
    targets = sequences.train_targets("all")
    model = OneRec(CONFIG).eval()
    assert model.memory is not None
    model.memory.fill(
        count_successors(sequences, targets, ITEMS, successors=ITEMS, window=3), world.codes_NQ
    )
    batch = assemble(sequences, targets[:40], world.codes_NQ, CONFIG)
    other = replace(batch, target_BQ=(batch.target_BQ + 1) % 16, fold_B=batch.fold_B + 1)
    sid_BQ = batch.target_BQ
    assert torch.equal(model.sid_log_probs(batch, sid_BQ), model.sid_log_probs(other, sid_BQ))


def make_recall() -> Recall:
    torch.manual_seed(1)
    score = 3 * torch.randn(4, 9, 3)
    score[:, 7:] = -torch.inf
    return Recall(torch.randint(0, 5, (4, 9, 3)), score, torch.rand(4, 6, 9) < 0.5)


def test_blended_probabilities_are_generated_and_copied_mass_over_their_sum() -> None:
    recall, logits = make_recall(), torch.randn(4, 6, 5)
    blended = recall.blend(logits, level=1).softmax(-1)
    for b in range(4):
        for w in range(6):
            mass = logits[b, w].exp().double()
            for m in range(9):
                if recall.match_BWM[b, w, m]:
                    mass[recall.code_BMQ[b, m, 1]] += recall.score_BMQ[b, m, 1].double().exp()
            assert torch.allclose(blended[b, w].double(), mass / mass.sum(), atol=1e-6)


def test_extreme_scores_stay_finite_with_finite_gradients() -> None:
    recall = make_recall()
    score = torch.full_like(recall.score_BMQ, 300.0).requires_grad_()
    logits = torch.tensor([-400.0, 0.0, 400.0, 0.0, 5.0]).expand(4, 6, 5).clone().requires_grad_()
    blended = replace(recall, score_BMQ=score).blend(logits, 0)
    blended.log_softmax(-1)[..., 1].sum().backward()
    assert torch.isfinite(blended).all()
    assert logits.grad is not None
    assert score.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.isfinite(score.grad).all()


def test_only_items_that_agree_with_all_codes_so_far_can_be_copied() -> None:
    recall = replace(make_recall(), match_BWM=torch.ones(4, 1, 9, dtype=torch.bool))
    first = torch.tensor([[0, 1, 2, 3, 4]] * 4)
    parent = torch.tensor([[4, 0, 2]] * 4)
    second = torch.tensor([[1, 3, 0]] * 4)
    beams = recall.follow(None, first, 0).follow(parent, second, 1)
    for b in range(4):
        for w, prefix in enumerate([(4, 1), (0, 3), (2, 0)]):
            agrees = [tuple(c[:2]) == prefix for c in recall.code_BMQ[b].tolist()]
            assert beams.match_BWM[b, w].tolist() == agrees


def test_without_a_memory_the_model_is_the_reports() -> None:
    config = CONFIG.model_copy(update={"memory": MemoryConfig(successors=0)})
    model = OneRec(config)
    assert not [name for name in model.state_dict() if name.startswith("memory")]
    logits = torch.randn(2, 3, 16)
    nothing = memory.nothing_recalled(2, 3, torch.device("cpu"))
    assert torch.equal(nothing.blend(logits, 0), logits)


def pairs_world(world: World) -> tuple[TrainingData, np.ndarray]:
    """Every item has one successor of its own, which shares no code with what other items have."""
    rng = np.random.default_rng(0)
    follows = rng.permutation(ITEMS)
    rows = []
    for row in world.train.to_pylist() + world.valid.to_pylist():
        items = [int(rng.integers(ITEMS))]
        while len(items) < len(row["item_index"]):
            noise = rng.random() < 0.3
            items.append(int(rng.integers(ITEMS)) if noise else int(follows[items[-1]]))
        rows.append({**row, "item_index": items, "positive": [True] * len(items)})
    users = len(world.train)
    train_table = type(world.train).from_pylist(rows[:users], world.train.schema)
    valid_table = type(world.train).from_pylist(
        [
            {**row, "target": int(follows[row["item_index"][-1]]), "target_timestamp_ms": 2**41}
            for row in rows[users:]
        ],
        world.valid.schema,
    )
    codes = np.stack([rng.permutation(ITEMS) % 16 for _ in range(3)], 1).astype(np.int32)
    data = TrainingData(
        read_sequences(train_table.to_batches()),
        read_sequences(valid_table.to_batches()),
        codes,
        np.ones(ITEMS, np.int64),
    )
    return data, follows


def test_pairs_without_any_pattern_are_learned_at_once_with_a_memory_and_not_without(
    world: World,
) -> None:
    data, _ = pairs_world(world)
    settings = TrainConfig(
        max_steps=60, epochs=50, batch_size=64, warmup_steps=5, evaluate_every=60, valid_beams=20
    )
    scores = {}
    for kept in (8, 0):
        config = CONFIG.model_copy(update={"memory": MemoryConfig(successors=kept)})
        scores[kept] = train(config, data, settings).best_score
    assert scores[8] > 0.6
    assert scores[0] < scores[8] / 2


def test_batches_move_with_what_the_memory_reads(world: World, sequences: Sequences) -> None:
    batch = assemble(sequences, sequences.train_targets("all")[:4], world.codes_NQ, CONFIG)
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert moved.fold_B.is_meta
    assert moved.pathways["short_term"].item_BL.is_meta


@pytest.mark.parametrize(("early", "by_time"), [(0, True), (1, True), (40, False)])
def test_folds_are_spans_of_time_where_all_but_a_few_requests_come_later(
    world: World, sequences: Sequences, early: int, by_time: bool
) -> None:
    """A split by days, of which some events bear a time of the day before."""
    targets = sequences.train_targets("all")
    valid = read_sequences(world.valid.to_batches())
    event_U = valid.example_targets()
    time_ms_E = valid.time_ms_E.copy()
    time_ms_E[event_U] = sequences.time_ms_E[targets].max() + 1
    time_ms_E[event_U[:early]] = sequences.time_ms_E[targets].min()
    data = TrainingData(
        sequences, replace(valid, time_ms_E=time_ms_E), world.codes_NQ, np.zeros(ITEMS)
    )
    fold_E = remember(SuccessorMemory(CONFIG), data, targets, CONFIG, seed=0)
    latest = [sequences.time_ms_E[targets[fold_E[targets] == f]].max() for f in range(memory.FOLDS)]
    assert (latest == sorted(latest)) == by_time
