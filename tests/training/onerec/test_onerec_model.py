"""Claims about the encoder-decoder (arXiv 2506.13695, sections 2.2 and 2.3)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from onerec_world import ITEMS, World, pad, trained_size

from components.training.onerec.attention import Attention
from components.training.onerec.config import LazyDecoderConfig, LifelongConfig, OneRecConfig
from components.training.onerec.data import (
    FEEDBACK_BITS,
    Batch,
    Events,
    Sequences,
    assemble,
    read_sequences,
)
from components.training.onerec.decoder import DecoderLayer
from components.training.onerec.encoder import EventPathway
from components.training.onerec.epochs import context_lengths
from components.training.onerec.model import OneRec

CONFIG = OneRecConfig(
    codebook_size=16,
    d_model=32,
    heads=4,
    ffn=48,
    short_term=5,
    positive_feedback=8,
    dropout=0.0,
    num_items=ITEMS,
)


@pytest.fixture(scope="module")
def sequences(world: World) -> Sequences:
    return read_sequences(world.train.to_batches())


@pytest.fixture(scope="module")
def batch(world: World, sequences: Sequences) -> Batch:
    return assemble(sequences, sequences.train_targets("all")[3:40:3], world.codes_NQ, CONFIG)


#: What every claim holds for: the report's decoder, its mixture of experts, the lazy decoder.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": 5, "active_experts": 2, "moe_in": "both"},
    "lazy": {"architecture": "lazy_decoder", "lazy": LazyDecoderConfig(key_layers=2, key_heads=2)},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> OneRec:
    torch.manual_seed(0)
    return trained_size(OneRec(CONFIG.model_copy(update=ARCHITECTURES[request.param])))


def test_first_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"codebook_size": 128, "num_items": 128})
    codes = torch.randint(0, 128, (64, 5, 3))
    none = torch.zeros(64, 5, dtype=torch.uint8)
    real = torch.ones(64, 5, dtype=torch.bool)
    events = Events(codes[..., 0], codes, none, none, none, none, real)
    pathways = {"short_term": events, "positive_feedback": events}
    batch = Batch(pathways, codes[:, 0], torch.zeros(64).long())
    with torch.no_grad():
        loss = float(OneRec(config)(batch).sum())
    # Logits begin with a standard deviation s of about 0.64, which costs s²/2 nats a level.
    assert 3 * math.log(128) < loss < 3 * (math.log(128) + 0.64**2 / 2 + 0.1)


def test_teacher_forced_log_probs_equal_those_of_cached_steps(model: OneRec, batch: Batch) -> None:
    z_BSD, mask = model.encode(batch)
    contexts = model.contexts(z_BSD)
    past: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in model.decoder]
    row = model.start_rows(len(batch))
    recall = model.recall(batch)
    for level in range(3):
        state = model.step(row, past, contexts, mask)
        stepped = model.logits(state, level, recall)[:, 0].log_softmax(-1)
        forced = model.level_logits(z_BSD, mask, batch.target_BQ, model.recall(batch))[level]
        forced = forced.log_softmax(-1)
        recall = recall.follow(None, batch.target_BQ[:, level, None], level)
        assert torch.allclose(stepped, forced, atol=1e-5)
        row = batch.target_BQ[:, level : level + 1] + level * 16
    # A cache of at most three positions a layer.
    assert [len(own) for own in past] == [3, 3]


def test_many_ids_of_a_request_share_its_context(model: OneRec, batch: Batch) -> None:
    """As reinforcement learning and samples of one request need it."""
    many = torch.randint(0, 16, (len(batch) * 5, 3))
    seen: list[int] = []
    hook = model.encoder_norm.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    ours = model.sid_log_probs(batch, many)
    assert seen == [len(batch)]
    hook.remove()
    for i in range(5):
        alone = model.sid_log_probs(batch, many[i::5])
        assert torch.allclose(ours[i::5], alone, atol=1e-5)


def test_a_batch_knows_whether_it_is_padded_and_a_full_one_needs_no_mask(
    world: World, sequences: Sequences, model: OneRec
) -> None:
    long = [e for e in sequences.example_targets() if context_of(sequences, int(e)) == 5 + 8]
    full = assemble(sequences, np.array(long[:6]), world.codes_NQ, CONFIG)
    assert not full.is_padded
    mixed = assemble(sequences, sequences.start_U1[:6] + 1, world.codes_NQ, CONFIG)
    assert mixed.is_padded
    masked = replace(full, is_padded=True)
    ours = model.sid_log_probs(full, full.target_BQ)
    assert torch.allclose(ours, model.sid_log_probs(masked, full.target_BQ), atol=1e-5)


def context_of(sequences: Sequences, event: int) -> int:
    return int(context_lengths(sequences, np.array([event]), CONFIG)[0])


def test_a_level_never_sees_its_own_or_a_later_code(model: OneRec, batch: Batch) -> None:
    z_BSD, mask = model.encode(batch)
    recall = model.recall(batch)
    before = model.level_logits(z_BSD, mask, batch.target_BQ, recall)
    for level in range(3):
        other = batch.target_BQ.clone()
        other[:, level:] = (other[:, level:] + 1) % 16
        after = model.level_logits(z_BSD, mask, other, recall)
        for earlier in range(level + 1):
            assert torch.allclose(before[earlier], after[earlier], atol=1e-6)
        for later in range(level + 1, 3):
            assert not torch.allclose(before[later], after[later], atol=1e-3)


def test_padding_changes_nothing(world: World, sequences: Sequences, model: OneRec) -> None:
    first = [int(s) + 2 for s in sequences.start_U1[:6]]
    batch = assemble(sequences, torch.tensor(first).numpy(), world.codes_NQ, CONFIG)
    padded = replace(batch, pathways={n: pad(e, 3, junk=7) for n, e in batch.pathways.items()})
    ours = model.sid_log_probs(batch, batch.target_BQ)
    assert torch.allclose(ours, model.sid_log_probs(padded, batch.target_BQ), atol=1e-5)


def test_rows_of_a_batch_do_not_influence_each_other(
    world: World, sequences: Sequences, model: OneRec
) -> None:
    chosen = sequences.train_targets("all")[::50][:12]
    together = assemble(sequences, chosen, world.codes_NQ, CONFIG)
    both = model.sid_log_probs(together, together.target_BQ)
    for b in range(len(chosen)):
        alone = assemble(sequences, chosen[b : b + 1], world.codes_NQ, CONFIG)
        assert torch.allclose(model.sid_log_probs(alone, alone.target_BQ)[0], both[b], atol=1e-5)


def test_a_user_without_any_event_gets_a_finite_answer(model: OneRec) -> None:
    none = torch.zeros(2, 1, dtype=torch.uint8)
    codes = torch.zeros(2, 1, 3, dtype=torch.long)
    events = Events(codes[..., 0], codes, none, none, none, none, torch.zeros(2, 1) > 0)
    pathways = {"short_term": events, "positive_feedback": events}
    batch = Batch(pathways, torch.zeros(2, 3).long(), torch.zeros(2).long())
    assert torch.isfinite(model(batch)).all()


def test_a_user_without_any_event_is_read_as_none_and_not_as_the_first_item(
    world: World, sequences: Sequences, model: OneRec
) -> None:
    first = sequences.start_U1[:2]
    alone = assemble(sequences, first, world.codes_NQ, CONFIG)
    assert not any(events.mask_BL.any() for events in alone.pathways.values())
    model.zero_grad()
    z_BSD, mask_B11S = model.encode(alone)
    z_BSD[mask_B11S[:, 0, 0]].square().sum().backward()
    embedding = cast(EventPathway, model.pathways["short_term"]).events
    for name, parameter in embedding.named_parameters():
        assert parameter.grad is None or not parameter.grad.any(), name
    assert model.position.grad.any()


@pytest.mark.parametrize(
    "feature", ["item_BL", "sid_BLQ", "feedback_BL", "gap_BL", "watch_BL", "duration_BL"]
)
@pytest.mark.parametrize("pathway", ["short_term", "positive_feedback"])
def test_every_feature_of_every_pathway_reaches_the_output(
    model: OneRec, batch: Batch, pathway: str, feature: str
) -> None:
    events = batch.pathways[pathway]
    changed = {**vars(events), feature: (getattr(events, feature) + 1) % 16}
    other = replace(batch, pathways={**batch.pathways, pathway: Events(**changed)})
    with torch.no_grad():
        before, after = (model.sid_log_probs(b, batch.target_BQ) for b in (batch, other))
    assert float((before - after).abs().max()) > 1e-3


@pytest.mark.parametrize("bit", range(FEEDBACK_BITS))
def test_every_bit_of_feedback_reaches_the_output(model: OneRec, batch: Batch, bit: int) -> None:
    for pathway in ("short_term", "positive_feedback"):
        events = batch.pathways[pathway]
        changed = {**vars(events), "feedback_BL": events.feedback_BL ^ (1 << bit)}
        other = replace(batch, pathways={**batch.pathways, pathway: Events(**changed)})
        with torch.no_grad():
            before, after = (model.sid_log_probs(b, batch.target_BQ) for b in (batch, other))
        assert float((before - after).abs().max()) > 1e-3


def test_order_of_the_history_matters(model: OneRec, batch: Batch) -> None:
    events = batch.pathways["short_term"]
    real = {name: x for name, x in vars(events).items() if x is not None}
    swapped = Events(**{name: value.flip(1) for name, value in real.items()})
    full = events.mask_BL.all(1)
    other = replace(batch, pathways={**batch.pathways, "short_term": swapped})
    with torch.no_grad():
        before, after = (model.sid_log_probs(b, batch.target_BQ)[full] for b in (batch, other))
    assert float((before - after).abs().max()) > 1e-3


def test_encoder_decoder_and_heads_share_one_embedding(model: OneRec) -> None:
    tables = [p for p in model.parameters() if p.shape == (3 * 16 + 1, 32)]
    assert len(tables) == 1
    assert tables[0] is model.tokens.weight


def test_item_embedding_is_the_sum_of_its_level_rows(model: OneRec) -> None:
    sid = torch.tensor([[[3, 0, 15], [1, 2, 3]]])
    rows = model.tokens.weight
    expected = torch.stack([rows[3] + rows[16] + rows[47], rows[1] + rows[18] + rows[35]])
    assert torch.allclose(model.tokens.items(sid)[0], expected, atol=1e-6)


def test_attention_equals_the_formula() -> None:
    torch.manual_seed(1)
    attention = Attention(CONFIG)
    x, z = torch.randn(2, 3, 32), torch.randn(2, 7, 32)
    mask = torch.rand(2, 1, 1, 7) > 0.3
    ours = attention(x, attention.keys_values(z), mask)
    k_weight, v_weight = attention.key_value.weight.split(32)
    mixed = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        q, k, v = (
            a @ w[part].T for a, w in ((x, attention.query.weight), (z, k_weight), (z, v_weight))
        )
        score = (q @ k.transpose(1, 2) / math.sqrt(8)).masked_fill(~mask[:, 0], -math.inf)
        mixed.append(score.softmax(-1) @ v)
    assert torch.allclose(ours, torch.cat(mixed, -1) @ attention.out.weight.T, atol=1e-6)


def test_positions_belong_to_pathways_and_one_can_be_left_out() -> None:
    lean = OneRec(CONFIG.model_copy(update={"positive_feedback": 0}))
    assert list(lean.pathways) == ["short_term"]
    assert lean.position.shape == (5, 32)
    assert list(OneRec(CONFIG).pathways) == ["short_term", "positive_feedback"]
    sizes = {"lifelong": LifelongConfig(entries=40, queries=3), "static_rows": [4, 7]}
    full = OneRec(CONFIG.model_copy(update=sizes))
    assert list(full.pathways) == ["static", "short_term", "positive_feedback", "lifelong"]
    assert full.position.shape == (1 + 5 + 8 + 3, 32)


@pytest.mark.parametrize("d_model", [128, 1024])
def test_weights_start_at_the_reports_size_scaled_to_the_width(d_model: int) -> None:
    torch.manual_seed(0)
    config = OneRecConfig(d_model=d_model, ffn=d_model, encoder_layers=1, decoder_layers=1)
    fresh = OneRec(config).requires_grad_(False)
    usual = 0.02 * math.sqrt(1024 / d_model)
    layer = fresh.decoder[0]
    assert isinstance(layer, DecoderLayer)
    residual = usual / math.sqrt(2 * 2)
    assert float(layer.cross_attention.out.weight.std()) == pytest.approx(residual, rel=0.05)
    assert float(layer.ffn[2].weight.std()) == pytest.approx(residual, rel=0.05)  # type: ignore[index]
    assert float(layer.cross_attention.query.weight.std()) == pytest.approx(usual, rel=0.05)
    assert float(fresh.tokens.weight.std()) == pytest.approx(usual, rel=0.05)


def test_bad_number_of_heads_is_refused_when_the_parameters_are_read() -> None:
    with pytest.raises(ValueError, match="no multiple of heads"):
        OneRecConfig(d_model=30, heads=4)
