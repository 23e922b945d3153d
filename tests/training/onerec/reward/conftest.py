"""A world with feedback and an untrained recommender of it, made anew for every file of tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from reward_world import RewardWorld, make_recommender, make_reward_world, parts_of

from components.training.onerec.data import read_sequences
from components.training.onerec.recommender import Recommender
from components.training.onerec.reward.align import Parts
from components.training.onerec.train import TrainingData
from components.training.onerec.trie import Trie, build_trie


@pytest.fixture(scope="module")
def world() -> RewardWorld:
    return make_reward_world()


@pytest.fixture(scope="module")
def data(world: RewardWorld) -> TrainingData:
    train, valid = (read_sequences(t.to_batches()) for t in (world.train, world.valid))
    return TrainingData(train, valid, world.codes_NQ, world.popularity_N)


@pytest.fixture(scope="module")
def trie(world: RewardWorld) -> Trie:
    return build_trie(world.codes_NQ, world.popularity_N)


@pytest.fixture(scope="module")
def recommender(data: TrainingData, trie: Trie) -> Recommender:
    return make_recommender(data, trie)


@pytest.fixture(scope="module")
def parts(world: RewardWorld, data: TrainingData, recommender: Recommender) -> Callable[..., Parts]:
    return parts_of(world, data, recommender)
