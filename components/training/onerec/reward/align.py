"""Runs rollouts, rewards and the trainer together, in one process or as Ray actors.

The driver decides by step numbers alone who does what with which weights, never by who is ready
first. So a rollout's staleness is known before it is made, is never above the bound, and both ways
of running give the same weights. With Ray the three live in processes of their own, on a cluster
on different machines, and while the trainer works on a step the rollouts of later ones are made.

Shapes: U train users, F features of a user, R users of rollouts, N items.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.pipeline.cluster import carried, ray_session, require_resources
from components.pipeline.errors import StageError
from components.training.onerec.reward.features import requests_after
from components.training.onerec.reward.workers import (
    RewardWorker,
    RolloutWorker,
    Trainer,
    TrainerState,
    rsft_targets,
)
from components.training.onerec.train import TrainingData, training_targets

if TYPE_CHECKING:
    from torch import Tensor

    from components.training.onerec.recommender import Recommender
    from components.training.onerec.reward.config import AlignConfig
    from components.training.onerec.reward.pscore import PScore

Int64 = npt.NDArray[np.int64]
CHECKPOINT = "align.safetensors"


@dataclass(frozen=True)
class Crew:
    """Who works, and how they are told.

    Attributes:
        call: ``(worker, method, *args)`` gives a handle; handles may be arguments of later calls.
            The calls of one worker are done in the order in which they are made.
        get: waits for the result of a handle.
    """

    rollout: list[Any]
    reward: Any
    trainer: Any
    call: Callable[..., Any]
    get: Callable[[Any], Any]


@dataclass
class Progress:
    """Where the alignment stands, between two segments.

    Attributes:
        trainer: state after ``trainer.step`` steps.
        exposed: what the industrial reward remembers.
        curve: one mapping a step, with ``step``; validations share the row of theirs.
        best_step, best_score: of the weights that are kept (`choice.py`); step 0: none so far.
        best_weights: empty for step 0.
    """

    trainer: TrainerState | None = None
    exposed: float | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    best_score: float = 0.0
    best_weights: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return self.trainer.step if self.trainer else 0


def align(
    crew: Crew,
    config: AlignConfig,
    progress: Progress,
    *,
    log: Callable[[Mapping[str, float], int], None] = lambda metrics, step: None,
    checkpoint: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """All steps from where ``progress`` stands.

    Weights go to the rollout workers as seldom as ``max_staleness`` allows. Nothing is asked for
    across a checkpoint, at which the newest weights are sent: a resumed run then does what an
    uninterrupted one does.

    Args:
        log: receives the metrics of every step.
        checkpoint: called every ``checkpoint_every`` steps and at the end; may choose weights.

    Returns:
        ``progress``, brought up to date.
    """
    call, get = crew.call, crew.get
    if progress.trainer is not None:
        get(call(crew.trainer, "restore", progress.trainer))
        get(call(crew.reward, "restore", progress.exposed))
    for begin in range(progress.step, config.steps, config.checkpoint_every):
        end = min(begin + config.checkpoint_every, config.steps)
        _send_weights(crew, begin)
        sent, asked = begin, begin
        waiting: dict[int, tuple[Any, Any]] = {}
        for step in range(begin, end):
            while asked < end and asked <= step + config.ahead:
                if asked - sent > config.max_staleness:
                    _send_weights(crew, step)
                    sent = step
                worker = crew.rollout[asked % len(crew.rollout)]
                rollouts = call(worker, "rollout", asked)
                waiting[asked] = rollouts, call(crew.reward, "score", rollouts)
                asked += 1
            metrics = get(call(crew.trainer, "step", *waiting.pop(step)))
            progress.curve.append({"step": step + 1, **metrics})
            log(metrics, step + 1)
        progress.trainer = get(call(crew.trainer, "state"))
        progress.exposed = get(call(crew.reward, "exposed"))
        if progress.exposed is not None:
            progress.curve[-1]["flagged_share"] = progress.exposed
        checkpoint(progress)
    return progress


def _send_weights(crew: Crew, version: int) -> None:
    weights = crew.call(crew.trainer, "weights")
    for worker in crew.rollout:
        crew.call(worker, "load", weights, version)


@dataclass(frozen=True)
class Parts:
    """Arguments of the workers, by name."""

    rollout: Mapping[str, Any]
    reward: Mapping[str, Any]
    trainer: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        recommender: Recommender,
        data: TrainingData,
        reward: PScore,
        config: AlignConfig,
        seed: int,
        *,
        user_UF: Int64,
        user_R: Int64,
        flagged_N: Tensor,
    ) -> Parts:
        """Arguments of workers for whom every request is a day after its user's last train event.

        Args:
            data: what the recommender was trained on.
            reward: the preference model that trains, not the one that judges.
            user_UF: features of the train users.
            user_R: train users for whom rollouts are made.
            flagged_N: bool, items of the industrial reward.

        Raises:
            StageError: no training target is left to fine-tune on (`rsft_targets`).
        """
        common = {"requests": requests_after(data.train), "config": config}
        # Here, and not by the trainer: of an actor that fails while it is made only that is told.
        target_S = training_targets(data, recommender.targets)
        sft_S = rsft_targets(data.train, target_S, config.rsft_drop, seed)
        learner = {**common, "recommender": recommender, "seed": seed}
        return cls(
            rollout={**learner, "user_R": user_R},
            reward={
                **common,
                "pscore": reward,
                "user_UF": user_UF,
                "codes_NQ": data.codes_NQ,
                "flagged_N": flagged_N,
            },
            trainer={**learner, "data": data, "sft_S": sft_S},
        )


def in_process(parts: Parts) -> Crew:
    """Everybody in this process, one after the other."""
    return Crew(
        rollout=[RolloutWorker(**parts.rollout)],
        reward=RewardWorker(**parts.reward),
        trainer=Trainer(**parts.trainer),
        call=lambda worker, method, *args: getattr(worker, method)(*args),
        get=lambda result: result,
    )


@contextmanager
def on_ray(
    parts: Parts, *, rollout_workers: int, cpus: int = 1, gpu: bool = False
) -> Iterator[Crew]:
    """A Ray actor each, and as many that generate as ``rollout_workers``.

    Args:
        cpus: of each actor, and its threads.
        gpu: one GPU for the trainer and one for each rollout worker.

    Raises:
        HardwareError: the cluster has fewer CPUs or GPUs than the actors ask for.
        ReelflowError: as an actor raised it.
        StageError: an actor raised any other exception, or died.
    """
    actors = rollout_workers + 2
    with ray_session(num_cpus=max(actors * cpus, os.cpu_count() or 1)) as ray:
        gpus = rollout_workers + 1 if gpu else 0
        require_resources(ray, f"{actors} actors", actors * cpus, gpus)

        def start(kind: type, args: Mapping[str, Any], own_gpu: bool) -> Any:
            given = {name: ray.put(value) for name, value in args.items()}
            # Ray's default fills one machine before it looks at another.
            remote = ray.remote(
                num_cpus=cpus, num_gpus=1 if own_gpu else 0, scheduling_strategy="SPREAD"
            )(kind)
            return remote.remote(**given, threads=cpus)

        def get(handle: Any) -> Any:
            try:
                return ray.get(handle)
            except ray.exceptions.RayError as error:
                cause: Any = error
                # What failed may have failed for what it was given.
                while isinstance(cause, ray.exceptions.RayTaskError):
                    cause = cause.cause
                if isinstance(cause, ray.exceptions.RayError):
                    raise _died(cause) from error
                text = f"{type(cause).__name__}: {cause}"
                raise carried(error) or StageError(f"the alignment failed: {text}") from error

        yield Crew(
            rollout=[start(RolloutWorker, parts.rollout, gpu) for _ in range(rollout_workers)],
            reward=start(RewardWorker, parts.reward, False),
            trainer=start(Trainer, parts.trainer, gpu),
            call=lambda worker, method, *args: getattr(worker, method).remote(*args),
            get=get,
        )


def _died(error: Exception) -> StageError:
    """The process of an actor ended, or what it made was lost with its machine."""
    first, *more = str(error).splitlines()
    where = "stage 'align_recommender'"
    if "creation task" in first:
        # Ray says with colours which call it was, then where, and the error itself at the end.
        begins = (n for n, line in enumerate(more) if re.match(r"[\w.]+(Error|Exception)\b", line))
        said = "\n".join(more[max(begins, default=-1) :]) or first
        return StageError(f"the alignment cannot begin: {said}", where=where)
    named = (line.partition("class_name:")[2].strip() for line in more)
    return StageError(
        f"{next(filter(None, named), 'a worker')} of the alignment died: {first}",
        where=where,
        remedy="if memory ran out, choose fewer users or a smaller group; checkpoints are kept: "
        "the same command resumes",
    )


def save_progress(progress: Progress, folder: Path) -> Path:
    """Write a checkpoint, one safetensors file that replaces the last; returns it.

    It is written under another name and renamed, so a kill leaves the old or the new.
    """
    from safetensors.torch import save_file

    assert progress.trainer is not None
    parts = {
        "weights": progress.trainer.weights,
        "moments": progress.trainer.moments,
        "best": progress.best_weights,
    }
    # Copies: chosen weights may be the newest ones, and a file shares nothing.
    tensors = {f"{part}/{name}": x.clone() for part, of in parts.items() for name, x in of.items()}
    facts = {name: getattr(progress, name) for name in _FACTS} | {"step": progress.step}
    unfinished = folder / f"{CHECKPOINT}.unfinished"
    save_file(tensors, unfinished, metadata={"facts": json.dumps(facts)})
    return unfinished.replace(folder / CHECKPOINT)


_FACTS = ("exposed", "curve", "best_step", "best_score")


def load_progress(folder: Path) -> Progress:
    """Read the checkpoint of a folder; a fresh start if it has none."""
    from safetensors import safe_open

    if not (folder / CHECKPOINT).exists():
        return Progress()
    parts: dict[str, dict[str, Any]] = {"weights": {}, "moments": {}, "best": {}}
    with safe_open(folder / CHECKPOINT, "pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        for key in stored.keys():  # noqa: SIM118  (it is no mapping)
            part, _, name = key.partition("/")
            parts[part][name] = stored.get_tensor(key)
    trainer = TrainerState(facts.pop("step"), parts["weights"], parts["moments"])
    return Progress(trainer=trainer, best_weights=parts["best"], **facts)
