"""Kills

SIGKILL of every part of a run, at random instants of every stage. Whatever is killed, the same
command ends with the results of a run that nobody disturbed, bit by bit; what was published is not
run again; training loses at most one interval of checkpoints and one report.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import wait_until_nothing_runs_in
from fault_suite import LONG
from faulty_s3 import FaultyS3
from finished_run import finished_run
from kills import (
    FLOW_PROCESS,
    GROUP,
    NURSERY,
    OBJECT_STORE,
    PREFECT_SERVER,
    RAY_DRIVER,
    RAY_WORKER,
    Chain,
    Undisturbed,
    outcome,
    published,
    steps_lost,
)
from smallest_run import EVALUATE_EVERY, STAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if LONG else 600)]

ANYWHERE = (FLOW_PROCESS, GROUP, RAY_DRIVER, NURSERY, PREFECT_SERVER)
#: Chains of kills in the long version, each in a home of its own; every fourth on an object store.
CHAINS = 20
#: How long a killed object store stays away, at most.
AWAY_S = 5.0
SHORT = (
    ("validate", RAY_DRIVER),
    ("train_recommender", RAY_WORKER),
    ("train_recommender", FLOW_PROCESS),
    ("train_recommender", GROUP),
    ("train_sasrec", PREFECT_SERVER),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = finished_run(tmp_path_factory)
    return outcome(published(str(folder / "store"), folder / "home", {}))


def plan(number: int, chance: random.Random, on_s3: bool) -> list[tuple[str, str]]:
    """Kills for one chain: one in every stage, and more in those that take long."""
    often = ("train_recommender", "train_recommender", "train_sasrec", "evaluate_recommender")
    stages = sorted([*STAGES, *often, *chance.sample(STAGES, 3)], key=STAGES.index)
    targets = itertools.cycle((*ANYWHERE, *([OBJECT_STORE] * 3 if on_s3 else [])))
    chosen = list(itertools.islice(targets, number, number + len(stages)))
    chance.shuffle(chosen)
    kills = list(zip(stages, chosen, strict=True))
    place = next(n for n, (stage, _) in enumerate(kills) if stage == "train_recommender")
    # While it trains there is one more thing to kill; twice, since Ray replaces it.
    return [*kills[:place], *[("train_recommender", RAY_WORKER)] * 2, *kills[place:]]


@pytest.mark.parametrize("number", range(CHAINS if LONG else 1))
def test_killed_again_and_again_it_ends_as_if_nothing_had_been(
    number: int, undisturbed: Undisturbed, tmp_path: Path, record: Callable[..., None]
) -> None:
    chance = random.Random(number)
    on_s3 = LONG and number % 4 == 3
    with store(tmp_path, on_s3) as (uri, variables, kill_store):
        home = tmp_path / "home"
        chain = Chain(home, uri, variables, chance, undisturbed.seconds, kill_store)
        chain.go(plan(number, chance, on_s3) if LONG else list(SHORT))
        wait_until_nothing_runs_in(home)
        resumed = outcome(published(uri, home, variables))
    assert resumed.outputs == undisturbed.outputs
    assert resumed.metrics == undisturbed.metrics
    lost = steps_lost(home)
    assert max(lost, default=0) <= 2 * EVALUATE_EVERY, lost
    for _, target in chain.kills:
        record(f"SIGKILL of {target}", "resumed, bitwise equal")


class store:
    """A folder, or an object store that is killed and comes back after a moment."""

    def __init__(self, folder: Path, on_s3: bool) -> None:
        self._folder, self._s3 = folder, FaultyS3(folder) if on_s3 else None

    def __enter__(self) -> tuple[str, dict[str, str], Callable[[], None] | None]:
        if self._s3 is None:
            return str(self._folder / "home" / "store"), {}, None
        self._s3.__enter__()
        uri = self._s3.make_bucket("reelflow") + "/store"
        return uri, {**self._s3.environment(), "ARTIFACT_ROOT": uri}, self._kill

    def _kill(self) -> None:
        assert self._s3 is not None
        self._s3.kill()
        time.sleep(random.uniform(0, AWAY_S))
        self._s3.restart(empty=False)

    def __exit__(self, *raised: object) -> None:
        if self._s3 is not None:
            self._s3.__exit__(*raised)
