"""Claims about a rule inside a training loop: ranks, repeats, resuming, and plain training."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as spawn
from sklearn.datasets import load_digits

from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.draw import shuffled
from components.curation.asp.sampler import Sampler
from components.curation.asp.schedule import Schedule
from components.curation.asp.selector import Seen
from components.curation.asp.signals import Forward

EPOCHS, BATCH = 4, 48


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x / 16).float(), torch.from_numpy(y)


def new_sampler(ratio: float, rank: int = 0, world_size: int = 1, **settings: Any) -> Sampler:
    config = AspConfig(signals={"el2n": 1.0, "grand_last": 1.0}, **settings)
    schedule = Schedule.of(ScheduleConfig(ratio=ratio), len(digits()[1]), EPOCHS)
    return Sampler(AspR(schedule, 0, config=config), BATCH, rank, world_size)


def new_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))


def train(sampler: Sampler, model: torch.nn.Sequential, epochs: int = EPOCHS) -> list[str]:
    """Digests of the subsets; the gradient is the sum over ranks."""
    x_ND, y_N = digits()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    found = []
    for epoch in sampler.epochs():
        for batch in epoch:
            feature_bD = model[:2](x_ND[batch.index_b])
            logit_bC, y_b = model[2](feature_bD), y_N[batch.index_b]
            loss_b = torch.nn.functional.cross_entropy(logit_bC, y_b, reduction="none")
            optimiser.zero_grad()
            ((loss_b * torch.from_numpy(batch.weight_b)).sum() / batch.size).backward()
            if sampler.world_size > 1:
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad)
            optimiser.step()
            epoch.record(batch, Forward(logit_bC.detach(), y_b, feature_bD.detach()))
        found.append(epoch.finish().digest)
        if sampler.selector.epoch == epochs:
            break
    return found


def test_all_data_is_plain_training_to_the_bit() -> None:
    by_rule, plain = new_model(), new_model()
    train(new_sampler(1.0), by_rule)
    x_ND, y_N = digits()
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.3)
    for epoch in range(1, EPOCHS + 1):
        for index_B in np.split(
            order := shuffled(np.arange(len(y_N)), 0, epoch), range(BATCH, len(order), BATCH)
        ):
            loss_B = torch.nn.functional.cross_entropy(
                plain(x_ND[index_B]), y_N[index_B], reduction="none"
            )
            optimiser.zero_grad()
            (loss_B.sum() / len(index_B)).backward()
            optimiser.step()
    for ours, theirs in zip(by_rule.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_ranks_share_out_every_batch() -> None:
    whole = new_sampler(0.3)
    epoch = next(whole.epochs())
    batches = [[b.index_b for b in next(new_sampler(0.3, r, 4).epochs())] for r in range(4)]
    for step, batch in enumerate(epoch):
        parts = [of_rank[step] for of_rank in batches]
        assert len({len(part) for part in parts}) == 1
        assert set(np.concatenate(parts)) == set(batch.index_b)
    shares = [list(next(new_sampler(0.3, r, 4).epochs())) for r in range(4)]
    last = [of_rank[-1] for of_rank in shares]
    assert sum(b.real_b.sum() for b in last) == last[0].size == len(epoch.subset.index_S) % BATCH
    assert sum(b.weight_b.sum() for b in last) == last[0].size
    assert epoch.steps == len(shares[0])


def test_a_killed_run_goes_on_to_the_same_subsets_and_weights() -> None:
    whole = new_model()
    digests = train(new_sampler(0.3), whole)
    model, killed = new_model(), new_sampler(0.3)
    begun = train(killed, model, 2)
    state = killed.state()
    resumed = new_sampler(0.3)
    resumed.restore(state)
    assert begun + train(resumed, model) == digests
    assert len(set(digests)) == EPOCHS
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def of_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{world_size}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    try:
        model, sampler = new_model(), new_sampler(0.3, rank, world_size)
        digests = train(sampler, model)
        if rank == 0:
            torch.save((digests, sampler.selector.arrays()), f"{folder}/{world_size}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_number_of_ranks_changes_no_subset(tmp_path: Path, world_size: int) -> None:
    alone = new_sampler(0.3)
    digests = train(alone, new_model())
    spawn.spawn(of_rank, (world_size, str(tmp_path)), nprocs=world_size)
    theirs, arrays = torch.load(tmp_path / f"{world_size}.pt", weights_only=False)
    assert theirs == digests
    for name, values in alone.selector.arrays().items():
        # Gradients are summed in another order.
        np.testing.assert_allclose(arrays[name], values, rtol=1e-3, atol=1e-5, err_msg=name)


def test_what_was_not_recorded_is_told() -> None:
    epochs = new_sampler(0.3).epochs()
    epoch = next(epochs)
    with pytest.raises(RuntimeError, match=r"recorded 0 samples, its subset has 539"):
        epoch.finish()
    with pytest.raises(RuntimeError, match="epoch 1 was left"):
        next(epochs)


def test_batches_have_the_weights_of_their_samples() -> None:
    sampler = new_sampler(0.3, mode="unbiased")
    sampler.selector.observe(first_epoch(sampler))
    epoch = next(sampler.epochs())
    weight_S = epoch.subset.weight_S
    assert weight_S is not None
    assert np.ptp(weight_S) > 0.1
    for batch in epoch:
        place_b = np.searchsorted(epoch.subset.index_S, batch.index_b)
        assert np.array_equal(batch.weight_b, weight_S[place_b])


def first_epoch(sampler: Sampler) -> Seen:
    """Signals that differ between samples."""
    index_S = sampler.selector.select(1).index_S
    value_S = (index_S / len(digits()[1])).astype(np.float32)
    return Seen(index_S, dict.fromkeys(sampler.selector.signals, value_S), value_S > 0.5)


def test_an_epoch_is_finished_once() -> None:
    sampler = new_sampler(0.3)
    epoch = next(sampler.epochs())
    for batch in epoch:
        logit_bC = torch.zeros(len(batch.index_b), 10)
        forward = Forward(logit_bC, digits()[1][batch.index_b], torch.zeros(len(logit_bC), 3))
        epoch.record(batch, forward)
    epoch.finish()
    with pytest.raises(RuntimeError, match="epoch 1 is finished already"):
        epoch.finish()
    assert (sampler.selector.epoch, sampler.selector.visit_N.max()) == (1, 1)


@pytest.mark.parametrize(("batch", "rank", "ranks"), [(0, 0, 1), (8, 2, 2), (8, -1, 2)])
def test_a_share_that_is_none_is_refused(batch: int, rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="batch_size="):
        Sampler(new_sampler(0.3).selector, batch, rank, ranks)
