"""Claims about data-parallel workers: they share out one training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from vit_world import TINY, digits

from components.curation.asp.asp_r import AspR
from components.curation.asp.config import AspConfig, ScheduleConfig
from components.curation.asp.sampler import Sampler
from components.curation.asp.schedule import Schedule
from components.curation.asp.signals import Forward
from components.training.vit.config import AugmentConfig, TrainConfig
from components.training.vit.sampler import EverySample, PlainSampler
from components.training.vit.train import TrainingData, train
from components.training.vit.train_state import TrainState

#: Subsets of 80 images make batches of 45 and 35: one of two workers repeats an image in each.
BATCH, EPOCHS = 45, 3
CONFIG = TrainConfig(
    epochs=EPOCHS,
    batch_size=BATCH,
    clip=1e6,
    augment=AugmentConfig(crop_padding=1, erasing=0.3, mixup=0.4),
)


def share(rank: int, world_size: int) -> Sampler:
    rule = AspR(Schedule.of(ScheduleConfig(ratio=0.4), 200, EPOCHS), 3, config=AspConfig())
    return Sampler(rule, BATCH, rank, world_size)


def run(sampler: Sampler, parallel: bool) -> TrainState:
    images = digits()
    data = TrainingData.of(images.take(np.arange(200)), images.take(np.arange(200, 251)))
    wrap = DistributedDataParallel if parallel else lambda model: model
    return train(TINY, data, CONFIG, sampler, forward=Forward, wrap=wrap)


def of_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
    try:
        sampler = share(rank, world_size)
        state = run(sampler, parallel=True)
        digests = [manifest.digest for manifest in sampler.manifests]
        if rank == world_size - 1:
            torch.save((state.weights, state.moments, state.curve, digests), f"{folder}/last.pt")
    finally:
        dist.destroy_process_group()


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    sampler = share(0, 1)
    alone = run(sampler, parallel=False)
    spawn(of_rank, (2, str(tmp_path)), nprocs=2)
    weights, moments, curve, digests = torch.load(tmp_path / "last.pt")
    assert digests == [manifest.digest for manifest in sampler.manifests]
    # Gradients are summed in another order.
    for name, value in alone.weights.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=name)
    # A wrong factor of all gradients would not be seen in weights: AdamW divides by their size.
    for name, value in alone.moments.items():
        torch.testing.assert_close(moments[name], value, rtol=1e-2, atol=1e-5, msg=name)
    for ours, theirs in zip(alone.curve, curve, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_workers_of_the_plain_sampler_share_out_every_batch(world_size: int) -> None:
    every = EverySample(200, 1)
    whole = [batch.index_b for batch in next(PlainSampler(every, BATCH, 3).epochs())]
    assert sorted(np.concatenate(whole)) == [*range(200)]
    shares = [
        list(next(PlainSampler(every, BATCH, 3, rank, world_size).epochs()))
        for rank in range(world_size)
    ]
    assert every.steps(BATCH) == len(whole) == len(shares[0])
    for index_B, *parts in zip(whole, *shares, strict=True):
        assert len({len(part.index_b) for part in parts}) == 1
        assert {part.size for part in parts} == {len(index_B)}
        counted = np.concatenate([part.index_b[part.weight_b == 1] for part in parts])
        assert sorted(counted) == sorted(index_B)
        assert sum(part.weight_b.sum() for part in parts) == len(index_B)
