"""Claims about the count of operations and of parameters (arXiv 2506.13695, sections 3.2, 4.5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from onerec_world import ITEMS, World
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthetic_onerec import catalogue, full_batch
from components.pipeline.params import load_params
from components.pipeline.stage import load_registry
from components.training.onerec.config import LazyDecoderConfig, OneRecConfig
from components.training.onerec.data import FEEDBACK_BITS, Batch
from components.training.onerec.decode import DeviceTrie, beam_search
from components.training.onerec.flops import _qformer, request_flops, sample_flops
from components.training.onerec.model import OneRec
from components.training.onerec.named_configs import (
    NAMES,
    PUBLISHED,
    counted_parameters,
    mixture_parameters,
    named_values,
    plain_config,
)
from components.training.onerec.qformer import QFormer
from components.training.onerec.trie import build_trie

SMALL = OneRecConfig(
    codebook_size=16,
    d_model=32,
    heads=4,
    ffn=48,
    encoder_layers=3,
    decoder_layers=2,
    short_term=5,
    positive_feedback=8,
    dropout=0.0,
    num_items=ITEMS,
    memory={"successors": 0},
    lifelong={"entries": 30, "queries": 4},
    author_rows=9,
    tag_rows=7,
    content_width=6,
    static_rows=[5, 3],
)
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"experts": 6, "active_experts": 2, "moe_in": "both"},
    "lazy": {"architecture": "lazy_decoder", "lazy": LazyDecoderConfig(key_layers=2, key_heads=2)},
}


def batch_of(config: OneRecConfig, size: int) -> Batch:
    return full_batch(config, catalogue(ITEMS, config.codebook_size), size)


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> OneRec:
    torch.manual_seed(0)
    return OneRec(SMALL.model_copy(update=ARCHITECTURES[request.param]))


def test_the_count_of_a_sample_is_that_of_the_products_that_run(model: OneRec) -> None:
    batch = batch_of(model.config, 3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model.train()(batch).sum()
    forward = counter.get_total_flops()
    assert 3 * sample_flops(model).forward == forward
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss.backward()
    measured = forward + counter.get_total_flops()
    # What enters of an event as numbers, its item's content and bits of feedback, has no gradient.
    saved = 3 * (5 + 8 + 30) * 2 * (6 * 32 + FEEDBACK_BITS * 16)
    assert measured == 3 * sample_flops(model).training - saved
    assert saved < 0.01 * measured


def test_the_count_of_a_request_is_that_of_the_products_of_its_beam_search(
    world: World, model: OneRec
) -> None:
    trie = DeviceTrie.on(build_trie(world.codes_NQ, world.popularity_N))
    batch = batch_of(model.config, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        beam_search(model.eval().requires_grad_(False), trie, batch, 6)
    counted = 2 * request_flops(model, 6).forward
    # A beam attends to its at most three own positions by sums of products, which nobody counts.
    own = 2 * len(model.decoder) * 4 * 32 * (1 + 2 * 6 + 3 * 6)
    assert counter.get_total_flops() == counted - own
    assert own < 0.02 * counted


def test_the_count_of_a_qformer_is_that_of_the_products_that_run() -> None:
    former = QFormer(queries=4, width=16, states=24, blocks=2, heads=2, ffn=20)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        former(torch.randn(1, 50, 24))
    assert counter.get_total_flops() == _qformer(former, 50)


def on_meta(name: str, **changes: Any) -> OneRec:
    with torch.device("meta"):
        return OneRec(plain_config(named_values(name, **changes)))


def test_named_sizes_have_the_reports_positions() -> None:
    assert len(on_meta("0p121b").position) == 1 + 20 + 256 + 128


def test_named_sizes_count_as_published() -> None:
    deviation = {}
    for name in NAMES:
        count = counted_parameters(on_meta(name))
        deviation[name] = count / 1e9 / PUBLISHED[name] - 1
        print(f"{name}: {count / 1e9:.4f}B counted, {deviation[name]:+.1%} from the published")
    assert abs(deviation["0p121b"]) < 0.03
    assert abs(deviation["0p935b"]) < 0.03
    # Twelve mixtures where eleven and a half would fit: 24 layers have no half mixture.
    assert 0.03 < deviation["2p633b"] < 0.04


def test_the_difference_of_two_published_sizes_fixes_the_width_of_an_expert() -> None:
    config = on_meta("0p935b").config
    assert 4 * mixture_parameters(config) == pytest.approx(0.935e9 - 0.121e9, rel=0.002)
    dense, sparse = (counted_parameters(on_meta(name)) for name in ("0p121b", "0p935b"))
    assert sparse - dense == 4 * mixture_parameters(config)
    printed = 4 * (24 * 3 * 1024 * 2048 - 2 * 1024 * 2048)
    assert abs(printed / (0.935e9 - 0.121e9) - 1) > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_named_values_are_a_whole_configuration(name: str) -> None:
    values = named_values(name)
    assert set(values) == set(OneRecConfig.model_fields)
    checked = OneRecConfig(**values)
    assert checked.model_dump() == values
    assert vars(plain_config(values))["d_model"] == checked.d_model
    assert checked.encoder_layers == checked.decoder_layers


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_of_each_name_trains_it(name: str) -> None:
    registry = load_registry()
    params = load_params(registry, profile=name)
    recommender: Any = params["train_recommender"]
    values = named_values(name)
    given = recommender.model.model_dump()
    assert given == {key: values[key] for key in given}
    assert params["semantic_ids"].codebook_size == values["codebook_size"]
    # One GPU trains, judges and aligns.
    for stage in ("train_reward_model", "train_recommender", "align_recommender"):
        gpus = registry[stage].gpus
        assert gpus is not None
        assert gpus(params[stage]) == 1, stage


def test_most_of_the_work_is_the_context() -> None:
    """The audit of arXiv 2508.20900 gives 97.66 % at a context of 512."""
    for name in NAMES:
        model = on_meta(name)
        for positions in (405, 512):
            flops = sample_flops(model, positions=positions)
            share = flops.context / flops.forward
            print(
                f"{name} at {positions} positions: {flops.forward / 1e9:.1f} GFLOPs a sample, "
                f"{share:.2%} context, {1 - share:.2%} target"
            )
            assert share > 0.97


def test_a_lazy_decoder_of_the_same_depth_needs_a_small_part_of_the_operations() -> None:
    whole = sample_flops(on_meta("0p121b"), positions=512)
    lazy = on_meta("0p121b", architecture="lazy_decoder", encoder_layers=1, decoder_layers=8)
    few = sample_flops(lazy, positions=512)
    print(f"{whole.forward / 1e9:.1f} GFLOPs, lazy {few.forward / 1e9:.1f}")
    layers = sum(p.numel() for n, p in lazy.named_parameters() if n.startswith("decoder."))
    both = on_meta("0p121b").named_parameters()
    assert layers > 0.9 * sum(p.numel() for n, p in both if n.startswith(("encoder.", "decoder.")))
    assert few.forward - few.pathways < 0.05 * (whole.forward - whole.pathways)


def test_active_experts_count_and_idle_ones_do_not() -> None:
    few, many = (on_meta("0p935b", experts=n) for n in (8, 64))
    router = 2 * 3 * 1024 * (64 - 8) * 4
    assert sample_flops(many).forward - sample_flops(few).forward == router
