"""Claims about training: plain training to the bit, resuming, what it tells and refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from vit_world import TINY, digits, same_tensors

from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.rules import Even, InfoBatch
from components.curation.asp.sampler import Sampler
from components.curation.asp.schedule import Schedule
from components.curation.asp.signals import Forward
from components.pipeline.errors import StageError
from components.training.vit.augment import Views, views
from components.training.vit.config import AugmentConfig, TrainConfig, VitConfig
from components.training.vit.data import read_images
from components.training.vit.evaluate import evaluate
from components.training.vit.model import Vit
from components.training.vit.sampler import EverySample, PlainSampler
from components.training.vit.train import (
    TrainingData,
    learning_rate_at,
    make_optimiser,
    sample_losses,
    train,
)
from components.training.vit.train_state import load_state

EPOCHS = 4
AUGMENT = AugmentConfig(crop_padding=1, flip=0.5, erasing=0.3, mixup=0.4)
TRAIN = TrainConfig(epochs=EPOCHS, batch_size=48, learning_rate=2e-3, augment=AUGMENT)
RANDOM = TINY.model_copy(update={"dropout": 0.1, "stochastic_depth": 0.2})


def data() -> TrainingData:
    images = digits()
    parts = (np.arange(200), np.arange(200, 270), np.arange(270, 300))
    return TrainingData.of(*(images.take(part) for part in parts))


def schedule(ratio: float) -> Schedule:
    return Schedule.of(ScheduleConfig(ratio=ratio), 200, EPOCHS)


def asp(ratio: float) -> Sampler:
    config = AspConfig(signals={"el2n": 1.0, "grand_last": 1.0})
    return Sampler(AspR(schedule(ratio), 3, config=config), TRAIN.batch_size)


def plain() -> PlainSampler:
    return PlainSampler(EverySample(200, EPOCHS), TRAIN.batch_size, 3)


class Recorder:
    """Keeps log lines and checkpoints; may end a run like a kill does."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        self.folder, self.stop_after = folder, stop_after
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, dict(metrics)))

    def checkpoint(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None) -> None:
        assert save is not None
        self.folder.mkdir(exist_ok=True)
        save(self.folder)
        if metrics["epoch"] == self.stop_after:
            raise KeyboardInterrupt


# What is trained


@pytest.mark.parametrize("augment", [AugmentConfig(crop_padding=0, flip=0), AUGMENT])
def test_all_samples_are_plain_training_to_the_bit(augment: AugmentConfig) -> None:
    config = TRAIN.model_copy(update={"augment": augment})
    sampler = Sampler(Even(schedule(1.0), 3), config.batch_size)
    trained = train(TINY, data(), config, sampler, forward=Forward)

    torch.manual_seed(config.seed)
    model = Vit(TINY)
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "position"]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name == "position"]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.999),
    )
    images = data().train
    pixel_NCHW = images.pixel_NCHW.float() / 255
    mean_C, std_C = (
        torch.tensor(x)[:, None, None]
        for x in (data().normalisation.mean_C, data().normalisation.std_C)
    )
    step, total = 0, EPOCHS * 5
    for epoch in range(1, EPOCHS + 1):
        order = sampler.order(np.arange(200), 3, epoch)
        for first in range(0, 200, config.batch_size):
            index_B = order[first : first + config.batch_size]
            seen = Views((pixel_NCHW[index_B] - mean_C) / std_C, images.label_N[index_B])
            if augment is AUGMENT:
                seen = views(images, index_B, data().normalisation, augment, 0, epoch)
            logit_BK = model(seen.image_BCHW)
            loss = F.cross_entropy(logit_BK, seen.label_B, reduction="none", label_smoothing=0.1)
            if seen.partner_B is not None and seen.share_B is not None:
                other = F.cross_entropy(
                    logit_BK, seen.partner_B, reduction="none", label_smoothing=0.1
                )
                loss = torch.lerp(other, loss, seen.share_B)
            optimiser.zero_grad()
            (loss.sum() / len(index_B)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            # Of twenty steps one warms up.
            done = (step - 1) / (total - 1)
            rate = 2e-3 if step == 0 else 2e-3 * (1 + math.cos(math.pi * done)) / 2
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            step += 1
    assert trained.step == step == total
    assert same_tensors(trained.weights, model.state_dict())


def test_the_plain_sampler_trains_like_one_that_takes_all() -> None:
    ours = plain()
    theirs = Sampler(
        Even(schedule(1.0), 3), TRAIN.batch_size, order=lambda index, seed, n: ours.order(n)
    )
    assert ours.selector.schedule.steps(48) == theirs.selector.schedule.steps(48) == 20
    by_ours = train(RANDOM, data(), TRAIN, ours)
    by_theirs = train(RANDOM, data(), TRAIN, theirs, forward=Forward)
    assert same_tensors(by_ours.weights, by_theirs.weights)
    assert by_ours.curve == by_theirs.curve
    assert sorted(ours.order(1)) == [*range(200)]
    assert not np.array_equal(ours.order(1), ours.order(2))


def test_a_subset_is_trained_on_with_its_own_number_of_steps() -> None:
    sampler = asp(0.4)
    state = train(TINY, data(), TRAIN, sampler, forward=Forward)
    assert state.step == EPOCHS * 2
    assert [manifest.samples for manifest in sampler.manifests] == [80] * EPOCHS
    # The cosine ends where training ends, not where it would on all images.
    rates = [row["learning_rate"] for row in state.curve]
    assert rates[-1] == learning_rate_at(7, 8, TRAIN) < 0.1 * TRAIN.learning_rate


def test_weights_of_losses_count() -> None:
    """A rule that leaves out easy images lets the others of them count for two."""
    rule = InfoBatch(schedule(1.0), 3)
    sampler = Sampler(rule, TRAIN.batch_size)
    state = train(TINY, data(), TRAIN, sampler, forward=Forward)
    assert sampler.manifests[1].samples < 200
    weight_S = rule.select(2).weight_S
    assert weight_S is not None
    assert set(weight_S.tolist()) == {1.0, 2.0}
    unweighted = Sampler(Unweighted(schedule(1.0), 3), TRAIN.batch_size)
    assert not same_tensors(
        state.weights, train(TINY, data(), TRAIN, unweighted, forward=Forward).weights
    )


class Unweighted(InfoBatch):
    """The same subsets, all of which count alike."""

    def select(self, epoch: int) -> Any:
        chosen = super().select(epoch)
        return type(chosen)(chosen.index_S)


def test_losses_of_mixed_images_are_those_of_mixed_labels() -> None:
    logit_BK = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    label_B, partner_B = torch.arange(6), torch.arange(6).flip(0)
    share_B = torch.linspace(0.5, 1, 6)
    seen = Views(torch.zeros(6, 3, 8, 8), label_B, partner_B, share_B)
    soft_BK = share_B[:, None] * F.one_hot(label_B, 10) + (1 - share_B)[:, None] * F.one_hot(
        partner_B, 10
    )
    expected_B = F.cross_entropy(logit_BK, soft_BK, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(sample_losses(logit_BK, seen, 0.1), expected_B)


def test_rates_warm_up_and_fall_to_nothing() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_share=0.1)
    rates = [learning_rate_at(step, 100, config) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert (rates[10], rates[55], rates[100]) == pytest.approx((1, 0.5, 0), abs=1e-12)
    assert learning_rate_at(150, 100, config) == 0
    assert learning_rate_at(0, 100, TrainConfig(learning_rate=1.0, warmup_share=0)) == 1


def test_matrices_alone_decay() -> None:
    model = Vit(TINY)
    decayed, others = make_optimiser(model, TRAIN).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in decayed["params"]}
    assert matrices == {
        name
        for name, p in model.named_parameters()
        if name.endswith("weight") and "norm" not in name
    }
    assert len(matrices) + len(others["params"]) == len(names)


def test_gradients_are_clipped() -> None:
    states = [
        train(TINY, data(), TRAIN.model_copy(update={"clip": clip}), plain())
        for clip in (1e-9, 1.0)
    ]
    # AdamW divides by the size of gradients; only its epsilon sees that they are tiny.
    moments = [state.moments["head.weight/exp_avg"].abs().max() for state in states]
    assert moments[0] < 1e-8 < moments[1]


# Resuming


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
@pytest.mark.parametrize("new_sampler", [lambda: asp(0.4), plain], ids=["asp", "plain"])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, new_sampler: Callable[[], Any], stop_after: int
) -> None:
    whole_sampler = new_sampler()
    whole = train(RANDOM, data(), TRAIN, whole_sampler, forward=Forward)
    killed = Recorder(tmp_path / "state", stop_after)
    with pytest.raises(KeyboardInterrupt):
        train(RANDOM, data(), TRAIN, new_sampler(), forward=Forward, checkpoint=killed.checkpoint)
    torch.rand(7)  # whatever else used the generator meanwhile
    resumed = new_sampler()
    state = train(
        RANDOM, data(), TRAIN, resumed, forward=Forward, restore=load_state(killed.folder)
    )
    assert same_tensors(state.weights, whole.weights)
    assert same_tensors(state.moments, whole.moments)
    assert state.curve == whole.curve
    assert (state.epoch, state.step) == (whole.epoch, whole.step)
    ours, theirs = resumed.state(), whole_sampler.state()
    assert (ours.epoch, ours.facts) == (theirs.epoch, theirs.facts)
    for name, values in theirs.arrays.items():
        np.testing.assert_array_equal(ours.arrays[name], values)
        assert ours.arrays[name].dtype == values.dtype


def test_a_state_of_another_sampler_is_refused(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "state")
    train(TINY, data(), TRAIN, plain(), checkpoint=recorder.checkpoint)
    state = load_state(recorder.folder)
    other = PlainSampler(EverySample(200, EPOCHS), TRAIN.batch_size, 4)
    with pytest.raises(StageError, match="has seed '3', the call '4'"):
        train(TINY, data(), TRAIN, other, restore=state)
    with pytest.raises(StageError, match="has rule 'plain'"):
        train(TINY, data(), TRAIN, asp(0.4), forward=Forward, restore=state)


def test_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    states = [
        train(RANDOM, data(), TRAIN.model_copy(update={"seed": seed}), plain()).weights
        for seed in (0, 0, 1)
    ]
    assert same_tensors(states[0], states[1])
    assert not same_tensors(states[0], states[2])


def test_every_step_has_random_branches_of_its_own() -> None:
    drawn = []

    class Drawing(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image_BCHW: torch.Tensor, with_feature: bool) -> Any:
            drawn.append(float(torch.rand(1)))
            return self.model(image_BCHW, with_feature)

    for seed in (0, 1):
        train(TINY, data(), TRAIN.model_copy(update={"seed": seed}), plain(), wrap=Drawing)
    assert len(set(drawn)) == len(drawn) == 40


def test_nobody_elses_random_numbers_are_touched() -> None:
    before = torch.random.get_rng_state()
    train(RANDOM, data(), TRAIN, plain())
    assert torch.equal(torch.random.get_rng_state(), before)


# What is told


def test_figures_are_logged_once_an_epoch(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    config = TRAIN.model_copy(update={"evaluate_every": 3})
    state = train(TINY, data(), config, plain(), log=recorder.log)
    assert [step for step, _ in recorder.logged] == [5, 10, 15, 20]
    assert [row["progress"] for _, row in recorder.logged] == [0.25, 0.5, 0.75, 1]
    judged = ["valid_top1" in row for _, row in recorder.logged]
    assert judged == [False, False, True, True]
    model = Vit(TINY)
    model.load_state_dict(state.weights)
    found = evaluate(model, data().valid, data().normalisation).metrics()
    assert found.items() <= recorder.logged[-1][1].items()


def test_a_rule_that_asks_for_it_is_told_the_loss_on_held_out_images() -> None:
    class Listening(Even):
        told: list[float]
        wants_validation = True

        def judge(self, loss: float) -> None:
            self.told.append(loss)

    rule = Listening(schedule(0.5), 3)
    rule.told = []
    state = train(TINY, data(), TRAIN, Sampler(rule, TRAIN.batch_size), forward=Forward)
    model = Vit(TINY)
    model.load_state_dict(state.weights)
    held_out = data().held_out
    assert held_out is not None
    assert len(rule.told) == EPOCHS
    assert rule.told[-1] == evaluate(model, held_out, data().normalisation).loss
    nothing = TrainingData.of(data().train, data().valid)
    with pytest.raises(ValueError, match="held_out"):
        train(TINY, nothing, TRAIN, Sampler(rule, TRAIN.batch_size), forward=Forward)


def test_a_diverged_loss_is_an_error_with_a_remedy() -> None:
    class Diverging(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image_BCHW: torch.Tensor, with_feature: bool) -> Any:
            logit_BK, feature_BD = self.model(image_BCHW, with_feature)
            return logit_BK * math.nan, feature_BD

    with pytest.raises(StageError, match="the loss is nan at step 5") as error:
        train(TINY, data(), TRAIN, plain(), wrap=Diverging)
    assert error.value.remedy is not None
    assert "learning_rate" in error.value.remedy


def test_a_compiled_model_trains_alike() -> None:
    compiled = train(TINY, data(), TRAIN, plain(), wrap=lambda m: torch.compile(m, backend="eager"))
    assert same_tensors(compiled.weights, train(TINY, data(), TRAIN, plain()).weights)


# Real photos


def test_sixty_four_real_photos_are_learned_by_heart(shared_data: Path) -> None:
    path = shared_data / "cifar10" / "train.parquet"
    if not path.exists():
        pytest.skip(f"no CIFAR-10 at {path}")
    photos = read_images(path, 32, 10, [0])
    train_images, others = photos.take(np.arange(64)), photos.take(np.arange(64, 564))
    model = VitConfig(patch=8, d_model=64, heads=2, layers=3, mlp=128)
    config = TrainConfig(
        epochs=60,
        batch_size=32,
        learning_rate=2e-3,
        label_smoothing=0,
        evaluate_every=60,
        augment=AugmentConfig(crop_padding=0, flip=0.5),
    )
    data = TrainingData.of(train_images, others)
    sampler = PlainSampler(EverySample(64, config.epochs), config.batch_size, 0)
    state = train(model, data, config, sampler)
    learned = Vit(model)
    learned.load_state_dict(state.weights)
    assert evaluate(learned, train_images, data.normalisation).top1 == 1.0
    # Something was learned beside it, though not much of 64 photos.
    assert 0.1 < state.curve[-1]["valid_top1"] < 0.5
