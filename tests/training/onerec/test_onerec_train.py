"""Claims about training: it learns, resumes to the bit, and workers share out one run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from onerec_world import ITEMS, MODEL, World, content, items_table, make_world
from pydantic import ValidationError
from safetensors import safe_open
from stage_harness import Bench
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from components.data.split import CATALOGUE_SCHEMA
from components.pipeline.errors import DataContractError, StageError
from components.training.onerec.config import (
    LifelongConfig,
    OneRecSize,
    TrainConfig,
)
from components.training.onerec.data import assemble, read_sequences
from components.training.onerec.model import OneRec
from components.training.onerec.stage import TrainRecommenderParams, train_recommender
from components.training.onerec.train import (
    TrainingData,
    learning_rate_at,
    make_optimiser,
    successors_of,
    train,
    training_targets,
)
from components.training.onerec.train_state import TrainState, load_state
from components.training.onerec.trie import shuffle_sids

EXPERTS = MODEL.model_copy(update={"dropout": 0.0, "experts": 4, "active_experts": 2})
TRAIN = TrainConfig(
    epochs=3, batch_size=64, learning_rate=3e-3, warmup_steps=10, evaluate_every=20, valid_beams=20
)


def data_of(world: World) -> TrainingData:
    return TrainingData(
        read_sequences(world.train.to_batches()),
        read_sequences(world.valid.to_batches()),
        world.codes_NQ,
        world.popularity_N,
    )


@pytest.fixture(scope="module")
def data(world: World) -> TrainingData:
    return data_of(world)


class Recorder:
    """Keeps every log line and checkpoint of a run."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.checkpoints: list[Path] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def checkpoint(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        assert save is not None
        folder = self.folder / str(len(self.checkpoints))
        folder.mkdir(parents=True)
        save(folder)
        self.checkpoints.append(folder)
        if len(self.checkpoints) == self.stop_after:
            raise KeyboardInterrupt

    def curve(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.logged if name in metrics]


def same_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(
    data: TrainingData, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainState, Recorder]:
    recorder = Recorder(tmp_path_factory.mktemp("whole"))
    state = train(MODEL, data, TRAIN, log=recorder.log, checkpoint=recorder.checkpoint)
    return state, recorder


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_a_resumed_run_ends_with_the_same_bits(
    data: TrainingData, whole: tuple[TrainState, Recorder], tmp_path: Path, kill_at: int
) -> None:
    killed = Recorder(tmp_path, stop_after=kill_at)
    with pytest.raises(KeyboardInterrupt):
        train(MODEL, data, TRAIN, checkpoint=killed.checkpoint)
    torch.rand(7)  # whatever else used the generator meanwhile
    state = train(MODEL, data, TRAIN, restore=load_state(killed.checkpoints[-1]))
    expected = whole[0]
    assert same_tensors(state.weights, expected.weights)
    assert same_tensors(state.best_weights, expected.best_weights)
    assert same_tensors(state.moments, expected.moments)
    assert state.curve == expected.curve
    assert (state.step, state.best_step, state.best_score) == (
        expected.step,
        expected.best_step,
        expected.best_score,
    )


def test_a_finished_run_resumes_to_itself(
    data: TrainingData, whole: tuple[TrainState, Recorder]
) -> None:
    state = train(MODEL, data, TRAIN, restore=load_state(whole[1].checkpoints[-1]))
    assert same_tensors(state.best_weights, whole[0].best_weights)
    assert state.step == whole[0].step


def test_same_seed_same_bits_and_another_seed_others(
    data: TrainingData, whole: tuple[TrainState, Recorder]
) -> None:
    again = train(MODEL, data, TRAIN)
    assert same_tensors(again.weights, whole[0].weights)
    other = train(MODEL, data, TRAIN.model_copy(update={"seed": 1, "epochs": 1}))
    assert not same_tensors(other.weights, whole[0].weights)


def test_a_checkpoint_is_safetensors_and_json_alone(whole: tuple[TrainState, Recorder]) -> None:
    folder = whole[1].checkpoints[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    with safe_open(folder / "state.safetensors", "pt") as file:
        assert {name.split("/")[0] for name in file.keys()} == {  # noqa: SIM118
            "weights",
            "best_weights",
            "moments",
        }


def test_it_learns_what_follows_what(whole: tuple[TrainState, Recorder]) -> None:
    state, recorder = whole
    losses = recorder.curve("loss")
    assert losses[-1] < losses[0] - 1
    # The next group is certain, the item in it is uniform: ten of sixty items can be ranked.
    chance = sum(1 / math.log2(1 + rank) for rank in range(1, 11)) / ITEMS
    assert state.best_score > 2.5 * chance
    oracle = sum(1 / math.log2(1 + rank) for rank in range(1, 11)) / 10
    assert state.best_score < 1.3 * oracle


def test_level_losses_add_up_and_speed_is_reported(whole: tuple[TrainState, Recorder]) -> None:
    for _, metrics in whole[1].logged:
        if "loss" in metrics:
            levels = sum(metrics[f"loss_{level}"] for level in (1, 2, 3))
            assert metrics["loss"] == pytest.approx(levels)
            assert metrics["learning_rate"] <= TRAIN.learning_rate
    assert min(whole[1].curve("samples_per_second")) > 0


def test_validation_loss_is_that_of_the_targets(
    data: TrainingData, whole: tuple[TrainState, Recorder]
) -> None:
    """The last one, recomputed: validation examples, no dropout, the counts that serve."""
    state, recorder = whole
    model = OneRec(MODEL)
    targets = training_targets(data, TRAIN.targets)
    assert model.memory is not None
    model.memory.fill(successors_of(data, targets, MODEL), data.codes_NQ)
    model.load_state_dict(state.weights)
    batch = assemble(data.valid, data.valid.example_targets(), data.codes_NQ, MODEL)
    with torch.inference_mode():
        expected = float(model.eval()(batch).sum())
    logged = [m["valid_loss"] for _, m in recorder.logged if "valid_loss" in m]
    assert logged[-1] == pytest.approx(expected, rel=1e-4)
    assert logged[-1] < logged[0] < 3.5 * math.log(MODEL.codebook_size)


def test_ids_without_semantics_are_learned_worse(
    data: TrainingData, whole: tuple[TrainState, Recorder]
) -> None:
    """Shuffled-id control: the groups are gone from level one, so few epochs teach much less."""
    codes = shuffle_sids(data.codes_NQ, np.ones(ITEMS), seed=0)
    shuffled = TrainingData(data.train, data.valid, np.asarray(codes), data.popularity_N)
    assert train(MODEL, shuffled, TRAIN).best_score < 0.8 * whole[0].best_score


def test_best_weights_are_those_of_the_best_validation(
    whole: tuple[TrainState, Recorder],
) -> None:
    state, recorder = whole
    scores = [(step, m["valid_ndcg_at_10"]) for step, m in recorder.logged if "valid_hr_at_10" in m]
    best_step, best = max(scores, key=lambda pair: pair[1])
    assert (state.best_step, state.best_score) == (best_step, best)
    place = [step for step, _ in scores].index(best_step)
    assert same_tensors(load_state(recorder.checkpoints[place]).weights, state.best_weights)


def test_patience_ends_a_run_that_no_longer_improves(data: TrainingData) -> None:
    config = TRAIN.model_copy(update={"learning_rate": 1e-9, "patience": 2, "epochs": 50})
    state = train(MODEL, data, config)
    assert state.stopped == "patience"
    assert state.stale == 2
    assert state.step < 50 * 10


def test_wall_clock_ends_a_run_and_counts_earlier_parts(data: TrainingData) -> None:
    ticks = iter(range(0, 10**9, 5))
    config = TRAIN.model_copy(update={"max_minutes": 1.0, "epochs": 50})
    state = train(MODEL, data, config, clock=lambda: float(next(ticks)))
    assert state.stopped == "time"
    assert state.seconds >= 60


def test_all_events_are_targets_where_none_is_positive(data: TrainingData, world: World) -> None:
    rows = [{**row, "positive": [False] * len(row["positive"])} for row in world.train.to_pylist()]
    bare = read_sequences(
        type(world.train).from_pylist(rows, schema=world.train.schema).to_batches()
    )
    one = TRAIN.model_copy(update={"epochs": 1})
    a, b = (
        train(MODEL, TrainingData(bare, data.valid, data.codes_NQ, data.popularity_N), config)
        for config in (one, one.model_copy(update={"targets": "all"}))
    )
    assert same_tensors(a.weights, b.weights)


def test_a_diverged_run_says_so(data: TrainingData) -> None:
    config = TRAIN.model_copy(update={"learning_rate": 1e30, "clip": 1e30})
    with pytest.raises(StageError, match="loss is nan at step 20") as caught:
        train(MODEL, data, config)
    assert "learning_rate" in caught.value.remedy


def test_workers_that_cannot_share_a_batch_evenly_are_refused_at_once() -> None:
    with pytest.raises(ValidationError, match="no multiple of workers 3"):
        TrainRecommenderParams(workers=3)


def test_a_log_with_nothing_to_learn_is_refused_before_any_worker_starts(
    tmp_path: Path, world: World
) -> None:
    bench = Bench(tmp_path)
    single = world.train.take(pa.array([0]))
    lists = [
        single[n].combine_chunks().slice(0, 1) if n == "user_id" else _firsts(single[n])
        for n in single.schema.names
    ]
    bench.give("train_sequences", lambda o: o.write_table(pa.table(lists, schema=single.schema)))
    bench.give("valid_examples", lambda o: o.write_table(world.valid))
    counts = np.zeros(ITEMS, np.int64)
    counts[0] = 1
    columns = [np.arange(ITEMS, dtype=np.int32), np.arange(ITEMS), counts, counts * 0]
    bench.give("catalogue", lambda o: o.write_table(pa.table(columns, schema=CATALOGUE_SCHEMA)))

    def semantic_ids(output: Any) -> None:
        output.save_state_dict({"codes": world.codes_NQ})
        output.write_json(
            {"version": "0", "num_items": ITEMS, "num_levels": 3, "codebook_size": 16}
        )

    bench.give("semantic_ids", semantic_ids)
    bench.give("items", lambda o: o.write_table(items_table()))
    bench.give("users", lambda o: o.write_table(pa.table({"user_id": [0, 1]})))
    bench.give("aligned_embedding", lambda o: o.save_state_dict({"embedding": content()}))
    params = TrainRecommenderParams(model=OneRecSize(lifelong=LifelongConfig(entries=50)))
    with pytest.raises(DataContractError, match="no user has two events"):
        bench.run(train_recommender, params)
    # What such a source cannot feed is left out, and said.
    assert bench.last_run is not None
    told = " ".join(bench.last_run.notes)
    for pathway in ("static", "lifelong"):
        assert f"the encoder has no {pathway} pathway" in told


def _firsts(column: pa.ChunkedArray) -> pa.Array:
    return pa.array([column[0].as_py()[:1]], column.type)


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [learning_rate_at(step, 100, TRAIN) for step in range(101)]
    assert rates[0] == pytest.approx(TRAIN.learning_rate / 10)
    assert max(rates) == rates[9] == rates[10] == TRAIN.learning_rate
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[100] == pytest.approx(TRAIN.learning_rate / 10)


def test_weight_decay_is_for_matrices_only() -> None:
    groups = make_optimiser(OneRec(MODEL), TRAIN).param_groups
    assert {p.dim() > 1 for p in groups[0]["params"]} == {True}
    assert {p.dim() for p in groups[1]["params"]} == {1}
    assert (groups[0]["weight_decay"], groups[1]["weight_decay"]) == (0.1, 0.0)


def _biases(state: TrainState) -> torch.Tensor:
    return torch.stack([w for name, w in state.weights.items() if name.endswith("bias_E")])


def test_experts_are_balanced_in_training_reported_and_resumed_to_the_bit(
    data: TrainingData, tmp_path: Path
) -> None:
    config = TRAIN.model_copy(update={"epochs": 1, "balance_rate": 1e-2})
    recorder = Recorder(tmp_path / "whole")
    whole = train(EXPERTS, data, config, log=recorder.log, checkpoint=recorder.checkpoint)
    assert _biases(whole).abs().max() > 0.02
    loads = recorder.curve("load_max_over_mean")
    assert min(loads) >= 1
    idle = train(EXPERTS, data, config.model_copy(update={"balance_rate": 0.0}))
    assert (_biases(idle) == 0).all()
    unbalanced = [row["load_max_over_mean"] for row in idle.curve if "load_max_over_mean" in row]
    assert loads[-1] < unbalanced[-1]
    again = train(EXPERTS, data, config, restore=load_state(recorder.checkpoints[0]))
    assert same_tensors(again.weights, whole.weights)
    assert again.curve == whole.curve


def test_a_lazy_decoder_trains_and_ranks_with_the_same_loop(data: TrainingData) -> None:
    lazy = MODEL.model_copy(update={"architecture": "lazy_decoder", "dropout": 0.0})
    state = train(lazy, data, TRAIN)
    chance = sum(1 / math.log2(1 + rank) for rank in range(1, 11)) / ITEMS
    assert state.best_score > 2.5 * chance
    assert not any(name.startswith("encoder.") for name in state.weights)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    losses: list[float] = []

    def log(metrics: Mapping[str, float], step: int) -> None:
        if "loss" in metrics:
            losses.append(metrics["loss"])

    def wrap(model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    calls: list[Any] = []
    state = train(
        MODEL.model_copy(update={"dropout": 0.0}),
        data_of(make_world()),
        TRAIN.model_copy(update={"epochs": 1}),
        rank=rank,
        world_size=2,
        wrap=wrap,
        log=log,
        checkpoint=lambda metrics, save: calls.append(save),
    )
    balanced = train(
        EXPERTS,
        data_of(make_world()),
        TRAIN.model_copy(update={"max_steps": 1}),
        rank=rank,
        world_size=2,
        wrap=wrap,
    )
    np.savez(
        f"{folder}/{rank}.npz",
        bias=_biases(balanced).numpy(),
        load=balanced.curve[0]["load_max_over_mean"],
        losses=losses,
        score=state.best_score,
        calls=len(calls),
        saves=sum(save is not None for save in calls),
        weights=torch.cat([w.flatten() for w in state.weights.values()]).numpy(),
    )
    torch.distributed.destroy_process_group()


def test_two_workers_train_the_same_run_as_one(data: TrainingData, tmp_path: Path) -> None:
    # Not by a fork: what earlier tests of this process started has threads and locks.
    torch.multiprocessing.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2))
    np.testing.assert_array_equal(first["weights"], second["weights"])
    assert first["calls"] == second["calls"] == 2
    assert (first["saves"], second["saves"]) == (2, 0)
    alone = train(
        MODEL.model_copy(update={"dropout": 0.0}), data, TRAIN.model_copy(update={"epochs": 1})
    )
    weights = torch.cat([w.flatten() for w in alone.weights.values()]).numpy()
    np.testing.assert_array_equal(first["losses"], second["losses"])
    expected = [row["loss"] for row in alone.curve if "loss" in row]
    np.testing.assert_allclose(first["losses"], expected, atol=1e-3)
    # Sums over a step are taken in another order; forty steps of Adam let that grow a little.
    np.testing.assert_allclose(first["weights"], weights, atol=2e-4)
    assert float(first["score"]) == pytest.approx(alone.best_score, abs=0.02)
    # One step from the same weights: the bias moved by the loads of both workers' samples.
    balanced = train(EXPERTS, data, TRAIN.model_copy(update={"max_steps": 1}))
    np.testing.assert_array_equal(first["bias"], second["bias"])
    np.testing.assert_array_equal(first["bias"], _biases(balanced).numpy())
    assert (first["bias"] != 0).any()
    assert float(first["load"]) == float(second["load"]) == balanced.curve[0]["load_max_over_mean"]
