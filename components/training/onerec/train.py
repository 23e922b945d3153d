"""The training loop of one worker: plain PyTorch, which a caller wraps for data parallelism.

It reports through callbacks and never starts or finds other workers itself; with several, the
caller has set up ``torch.distributed`` and gives ``wrap`` (DDP). What a step does is a function of
(weights, optimiser, seed, step): batches come from `EpochOrder` and dropout is seeded by the step,
so a resumed run ends with the same bits as one that was never stopped. Without dropout, losses on
any number of workers agree up to the order of floating-point sums, because the workers share out
the same steps.

Shapes: U validation users, Q levels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from components.pipeline.errors import StageError
from components.pipeline.moments import restore_moments
from components.training.onerec.data import Sequences, Targets, assemble
from components.training.onerec.decode import DeviceTrie, recommend
from components.training.onerec.epochs import EpochOrder, context_lengths
from components.training.onerec.experts import balance_experts
from components.training.onerec.features import Features
from components.training.onerec.memory import (
    FOLDS,
    SuccessorMemory,
    Successors,
    count_successors,
    deal_folds,
)
from components.training.onerec.model import OneRec
from components.training.onerec.train_state import (
    TrainState,
    copied,
    keep,
    save_state,
)
from components.training.onerec.trie import build_trie

if TYPE_CHECKING:
    from components.training.onerec.config import OneRecConfig, TrainConfig

SELECTION_K = 10
LOG_EVERY_STEPS = 20
#: Validation users whose loss is taken.
LOSS_USERS = 512

Log = Callable[[Mapping[str, float], int], None]
Save = Callable[[Path], None]
Checkpoint = Callable[[Mapping[str, float], Save | None], None]


@dataclass(frozen=True)
class TrainingData:
    """What a worker trains on.

    Attributes:
        train: train sequences.
        valid: validation examples (`read_sequences` of an example table).
        codes_NQ: int32 semantic ids of the catalogue.
        popularity_N: training popularity; orders items that share an id.
        features: of items and users; None: nothing is known of them.
    """

    train: Sequences
    valid: Sequences
    codes_NQ: np.ndarray
    popularity_N: np.ndarray
    features: Features | None = None


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay to a tenth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.learning_rate * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


class Rates(Protocol):
    """What AdamW is told."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


def make_optimiser(model: nn.Module, config: Rates) -> torch.optim.AdamW:
    """AdamW(0.9, 0.95); weight decay on matrices and tables, none on gains and biases.

    On a GPU all parameters are updated by one kernel.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=on_gpu or None
    )


def train(
    model_config: OneRecConfig,
    data: TrainingData,
    config: TrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str = "cpu",
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    log: Log = lambda metrics, step: None,
    checkpoint: Checkpoint = lambda metrics, save: None,
    restore: TrainState | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Train on this worker's share of every step and keep the best weights by validation NDCG@10.

    Args:
        wrap: makes the model data-parallel, e.g. ``DistributedDataParallel``; with
            ``world_size > 1`` the default process group must exist.
        log: receives ``loss`` (L_NTP, nats), ``loss_1`` … by level, ``learning_rate``,
            ``samples_per_second`` and with experts ``load_max_over_mean`` (1: even) with their
            step, every `LOG_EVERY_STEPS` steps.
        checkpoint: called by every rank after every validation with its metrics, and on rank 0
            with a function that writes the state into a folder (else None).
        restore: state to go on from.
        clock: seconds; a test gives its own.

    Returns:
        the final state, on every rank the same but for the clock's figures; the model to use is
        ``best_weights``.

    Raises:
        StageError: the loss is no longer a number.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = OneRec(model_config)
    state = restore or TrainState()
    targets = training_targets(data, config.targets)
    data = _attached(data, targets, model_config, config)
    if state.weights:
        model.load_state_dict(state.weights)
    fold_E = None
    if model.memory is not None:
        fold_E = remember(model.memory, data, targets, model_config, config.seed)
    model.to(device)
    wrapped = wrap(model)
    optimiser = make_optimiser(model, config)
    restore_moments(model, optimiser, state.moments)

    lengths = context_lengths(data.train, targets, model_config)
    order = EpochOrder(targets, lengths, config.batch_size, config.seed, rank, world_size)
    total = min(config.epochs * order.steps, config.max_steps)
    interval = config.evaluate_every
    trie = DeviceTrie.on(build_trie(data.codes_NQ, data.popularity_N), device)
    began, before = clock(), state.seconds
    meter = _Meter(clock)

    while state.step < total and not state.stopped:
        epoch, first = divmod(state.step, order.steps)
        for event_B in order.epoch(epoch, first):
            rate = learning_rate_at(state.step, total, config)
            batch = assemble(data.train, event_B, data.codes_NQ, model_config, fold_E)
            batch = batch.to(device)
            loss_Q, load = train_step(
                model, wrapped, optimiser, batch, rate, config, state.step, rank
            )
            state.step += 1
            meter.add(loss_Q, load, len(batch) * world_size)
            validated = state.step % interval == 0 or state.step == total
            # Read before a checkpoint, so that a resumed run logs the same means.
            if state.step % LOG_EVERY_STEPS == 0 or validated:
                metrics = {**meter.read(world_size), "learning_rate": rate}
                _require_finite(metrics["loss"], state.step)
                state.note(metrics, state.step)
                log({**metrics, "progress": state.step / total}, state.step)
            if validated:
                metrics = validate(model, trie, data, config, rank, world_size)
                state.seconds = before + clock() - began
                _judge(state, metrics["valid_ndcg_at_10"], model, config, total)
                # Only one worker's clock may decide, or the others would wait for it forever.
                state.stopped = _agree(state.stopped, device, world_size)
                state.note(metrics, state.step)
                log(metrics, state.step)
                checkpoint(metrics, _saver(state, model, optimiser) if rank == 0 else None)
                meter.reset_clock()
                if state.stopped:
                    break
    keep(state, model, optimiser)
    return state


def training_targets(data: TrainingData, targets: Targets = "positive") -> np.ndarray:
    """Events that are learned as targets: int64 [S]; all, where none is positive."""
    wanted = data.train.train_targets(targets)
    return wanted if len(wanted) else data.train.train_targets("all")


def validation_targets(data: TrainingData, config: TrainConfig) -> np.ndarray:
    """Targets of the users who are validated on, spread evenly: int64 [U]."""
    event_U = data.valid.example_targets()
    chosen = np.linspace(0, len(event_U) - 1, min(len(event_U), config.valid_users)).astype(int)
    return event_U[np.unique(chosen)]


def _attached(
    data: TrainingData, target_S: np.ndarray, model: OneRecConfig, config: TrainConfig
) -> TrainingData:
    """The data whose sequences carry what the model reads beside events."""
    features = data.features or Features.none(len(data.codes_NQ))
    return replace(
        data,
        train=features.attach(data.train, target_S, model),
        valid=features.attach(data.valid, validation_targets(data, config), model),
    )


def successors_of(data: TrainingData, target_S: np.ndarray, config: OneRecConfig) -> Successors:
    """What the memory counts of some training targets."""
    return count_successors(
        data.train,
        target_S,
        config.num_items,
        successors=config.memory.successors,
        window=config.memory.window,
    )


def remember(
    memory: SuccessorMemory,
    data: TrainingData,
    target_S: np.ndarray,
    config: OneRecConfig,
    seed: int,
) -> np.ndarray:
    """Fill the tables of the memory; returns the fold of every event, uint8 [E]."""
    memory.fill(successors_of(data, target_S, config), data.codes_NQ)
    return practise(memory, data, target_S, config, seed)


def practise(
    memory: SuccessorMemory,
    data: TrainingData,
    target_S: np.ndarray,
    config: OneRecConfig,
    seed: int,
) -> np.ndarray:
    """Fill the tables of training alone; returns the fold of every event, uint8 [E]."""
    folds = deal_folds(data.train, target_S, by_time=_come_later(data, target_S), seed=seed)
    memory.practise_on(
        [successors_of(data, folds.known_to(fold, target_S), config) for fold in range(FOLDS)]
    )
    return folds.fold_E


#: Share of requests, and of targets, of which all must be true that is said of them: days are those
#: of the platform, and an event close to midnight may bear a time of the day before.
_NEARLY_ALL = 0.98


def _come_later(data: TrainingData, target_S: np.ndarray) -> bool:
    """Whether validation requests come after the training targets; so will those of users."""
    valid_S = data.valid.example_targets()
    if not len(valid_S):
        return False
    last_ms = np.quantile(data.train.time_ms_E[target_S], _NEARLY_ALL)
    return bool((data.valid.time_ms_E[valid_S] >= last_ms).mean() >= _NEARLY_ALL)


def validate(
    model: OneRec,
    trie: DeviceTrie,
    data: TrainingData,
    config: TrainConfig,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """NDCG@10 and HR@10 of items by beam search, history not masked, and L_NTP of the targets.

    Workers share the users; the loss, of which a few hundred users say enough, is the mean of
    ``LOSS_USERS`` of them.
    """
    event_u = validation_targets(data, config)[rank::world_size]
    # Requests of similar length together: less padding.
    event_u = event_u[np.argsort(context_lengths(data.valid, event_u, model.config), kind="stable")]
    lists = recommend(
        model,
        trie,
        data.valid,
        event_u,
        data.codes_NQ,
        width=config.valid_beams,
        top_n=SELECTION_K,
    )
    sums = torch.zeros(5, dtype=torch.float64)
    start = 0
    for item_BN, _ in lists:
        target_B = data.valid.item_E[event_u[start : start + len(item_BN)]]
        start += len(item_BN)
        row, place = np.nonzero(item_BN == target_B[:, None])
        gain = (1 / np.log2(2.0 + place)).sum()
        sums[:3] += torch.tensor([gain, len(row), len(item_BN)])
    for event_B in _loss_users(event_u, world_size):
        batch = assemble(data.valid, event_B, data.codes_NQ, model.config)
        with torch.inference_mode():
            losses = float(model(batch.to(model.position.device)).sum()) * len(event_B)
        sums[3:] += torch.tensor([losses, len(event_B)])
    if world_size > 1:
        sums = _all_reduce(sums, next(model.parameters()).device)
    gain, hits, users, losses, judged = sums.tolist()
    return {
        "valid_ndcg_at_10": gain / max(1, users),
        "valid_hr_at_10": hits / max(1, users),
        "valid_loss": losses / max(1, judged),
    }


def _loss_users(event_u: np.ndarray, world_size: int) -> list[np.ndarray]:
    """This worker's share of the users whose loss is taken, in batches."""
    count = min(len(event_u), LOSS_USERS // world_size)
    place = np.linspace(0, len(event_u) - 1, count).astype(int) if count else np.zeros(0, int)
    return [event_u[part] for part in np.array_split(place, -(-count // 128))] if count else []


def _require_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise StageError(
            f"the loss is {loss} at step {step}",
            where="stage 'train_recommender'",
            remedy="lower train_recommender.learning_rate",
        )


def train_step(
    model: OneRec,
    wrapped: nn.Module,
    optimiser: torch.optim.Optimizer,
    batch: Any,
    rate: float,
    config: TrainConfig,
    step: int,
    rank: int,
) -> tuple[Tensor, Tensor | None]:
    """One update; returns the loss of every level and how unevenly experts were loaded, if any."""
    # Dropout is a function of the step, so that nothing of a generator's state must be kept.
    torch.manual_seed(np.random.SeedSequence([config.seed, step, rank]).generate_state(1)[0].item())
    for group in optimiser.param_groups:
        group["lr"] = rate
    wrapped.train()
    on_cuda = batch.target_BQ.is_cuda
    with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
        loss_Q = wrapped(batch)
    optimiser.zero_grad(set_to_none=True)
    loss_Q.sum().backward()
    nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimiser.step()
    return loss_Q.detach(), balance_experts(model, config.balance_rate)


def _judge(state: TrainState, score: float, model: OneRec, config: TrainConfig, total: int) -> None:
    """Keep the best weights and decide whether to go on."""
    if score > state.best_score:
        state.best_score, state.best_step, state.stale = score, state.step, 0
        state.best_weights = copied(model.state_dict())
    else:
        state.stale += 1
    if state.step >= total:
        state.stopped = "steps"
    elif state.stale >= config.patience:
        state.stopped = "patience"
    elif state.seconds >= 60 * config.max_minutes:
        state.stopped = "time"


_REASONS = ("", "steps", "patience", "time")


def _agree(stopped: str, device: str, world_size: int) -> str:
    """Stop if any worker wants to."""
    if world_size == 1:
        return stopped
    votes = torch.zeros(len(_REASONS), dtype=torch.float64)
    votes[_REASONS.index(stopped)] = 1
    votes = _all_reduce(votes, torch.device(device))
    return next((_REASONS[i] for i in range(1, len(_REASONS)) if votes[i] > 0), "")


def _all_reduce(values: Tensor, device: torch.device) -> Tensor:
    values = values.to(device)
    torch.distributed.all_reduce(values)
    return values.cpu()


def _saver(state: TrainState, model: OneRec, optimiser: torch.optim.Optimizer) -> Save:
    def save(folder: Path) -> None:
        keep(state, model, optimiser)
        save_state(state, folder)

    return save


class _Meter:
    """Means since the last reading: loss, speed, and the experts' largest over mean load."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._losses: list[Tensor] = []
        self._loads: list[Tensor] = []
        self._samples = 0
        self._since = clock()

    def add(self, loss_Q: Tensor, load: Tensor | None, samples: int) -> None:
        self._losses.append(loss_Q)
        if load is not None:
            self._loads.append(load)
        self._samples += samples

    def reset_clock(self) -> None:
        """Leave out the time of a validation."""
        self._since, self._samples = self._clock(), 0

    def read(self, world_size: int) -> dict[str, float]:
        """Means over the samples of all workers, each of which must call this."""
        mean_Q = torch.stack(self._losses).double().mean(0)
        if world_size > 1:
            mean_Q = _all_reduce(mean_Q, mean_Q.device) / world_size
        by_level = mean_Q.tolist()
        seconds = self._clock() - self._since
        metrics = {"loss": sum(by_level)}
        metrics |= {f"loss_{level}": value for level, value in enumerate(by_level, 1)}
        if self._samples and seconds > 0:
            metrics["samples_per_second"] = self._samples / seconds
        if self._loads:
            # Every worker has the loads of all, and so the same mean.
            metrics["load_max_over_mean"] = float(torch.stack(self._loads).double().mean())
        self._losses.clear()
        self._loads.clear()
        self.reset_clock()
        return metrics
