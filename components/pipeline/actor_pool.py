"""Jobs through a pool of actors that each hold what the work needs, on Ray.

A job gives one item after another (a trained epoch, a finished batch); the driver gets each as soon
as it is there. An actor that dies is replaced, and its job begins again from what the driver then
has to give it, so that a job loses the item it was at and no more.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from components.pipeline.cluster import carried, ray_session, require_resources
from components.pipeline.errors import StageError

MAX_DEATHS = 2

#: A job by its number: what to call an actor with, asked when the job begins (again).
Jobs = Mapping[int, Callable[[], tuple[Any, ...]]]
#: Does jobs and yields (number of the job, item), in the order in which items are ready.
RunJobs = Callable[[Jobs], Iterator[tuple[int, Any]]]


def in_turn(actor: Callable[..., Iterator[Any]]) -> RunJobs:
    """The same without Ray: one job after another in this process."""

    def run(jobs: Jobs) -> Iterator[tuple[int, Any]]:
        for number, args in jobs.items():
            for item in actor(*args()):
                yield number, item

    return run


@contextmanager
def actor_pool(
    actor: type,
    actor_args: Mapping[str, Any],
    *,
    concurrency: int,
    cpus_per_actor: int = 1,
    max_deaths: int = MAX_DEATHS,
) -> Iterator[RunJobs]:
    """Actors, for as long as the block lasts, and the function that gives them jobs.

    Args:
        actor: importable class; ``__init__(**actor_args)``, and ``__call__(*args)`` is a generator.
        actor_args: sent once, whatever the number of actors.
        concurrency: actors in the pool, each in a process of its own.
        max_deaths: of actors, in the whole block.

    Raises:
        HardwareError: the cluster has fewer CPUs than the actors ask for.
        ReelflowError: as the actor raised it.
        StageError: the actor raised any other exception, or too many actors died.
    """
    cpus = concurrency * cpus_per_actor
    with ray_session(num_cpus=max(cpus, os.cpu_count() or 1)) as ray:
        require_resources(ray, f"{concurrency} actors", cpus, 0)
        given = {name: ray.put(value) for name, value in actor_args.items()}
        remote = ray.remote(num_cpus=cpus_per_actor)(actor)
        idle = [remote.remote(**given) for _ in range(concurrency)]
        deaths = 0

        def run(jobs: Jobs) -> Iterator[tuple[int, Any]]:
            nonlocal deaths
            waiting = deque(jobs)
            busy: dict[Any, tuple[int, Any]] = {}
            while waiting or busy:
                while waiting and idle:
                    number, worker = waiting.popleft(), idle.pop()
                    call = worker.__call__.options(num_returns="streaming")
                    busy[call.remote(*jobs[number]())] = (number, worker)
                (ready,), _ = ray.wait(list(busy), num_returns=1)
                number, worker = busy[ready]
                try:
                    yield number, ray.get(next(ready))
                except StopIteration:
                    del busy[ready]
                    idle.append(worker)
                except ray.exceptions.RayActorError as error:
                    del busy[ready]
                    deaths += 1
                    if deaths > max_deaths:
                        raise StageError(
                            f"actor {actor.__name__} died {deaths} times",
                            remedy="if memory ran out, choose fewer workers; what was done is "
                            "kept: the same command resumes",
                        ) from error
                    idle.append(remote.remote(**given))
                    waiting.appendleft(number)
                except ray.exceptions.RayTaskError as error:
                    text = f"{type(error.cause).__name__}: {error.cause}"
                    own = StageError(f"actor {actor.__name__} failed: {text}")
                    raise carried(error) or own from error

        yield run
