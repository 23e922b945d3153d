"""Trains SASRec and chooses its hyper-parameters by successive halving on validation NDCG@10.

Every candidate of the grid trains for a few epochs, the better half goes on (from where it
stands), and so on until one is left, which trains until its validation score stops rising. The
budget is counted in epochs, so that the result depends neither on the speed of the machine nor on
how many candidates train at once; the wall-clock limit is a safety net, and `Search.cut_short` says
whether it was needed.

Shapes: B batch, L length, D width, M predicted positions, U users.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from components.pipeline.actor_pool import RunJobs, in_turn
from components.training.sasrec import checkpoint
from components.training.sasrec.config import SasrecConfig, SasrecParams
from components.training.sasrec.data import Sequences, epoch_windows, newest_windows
from components.training.sasrec.model import Sasrec, full_softmax_loss

WARMUP_STEPS = 100
#: Enough to tell candidates apart; where an epoch is longer, the first rung is one epoch.
RUNG_STEPS = 250
#: Share of the time limit for choosing among candidates; the rest is the chosen one's.
RUNG_TIME = 0.7
SELECTION_K = 10

Log = Callable[[dict[str, float], int], None]
Clock = Callable[[], float]


@dataclass
class Candidate:
    """One cell of the grid while it trains.

    Attributes:
        best_score: highest validation NDCG@10 so far, `best_state` its weights.
        cut: whether the clock ended an epoch of it.
        curve: (epoch, train loss, validation NDCG@10).
    """

    number: int
    learning_rate: float
    model: Sasrec
    optimiser: torch.optim.Optimizer
    seed: int
    step: int = 0
    epoch: int = 0
    best_epoch: int = 0
    best_score: float = -1.0
    cut: bool = False
    best_state: dict[str, Tensor] = field(default_factory=dict)
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def score_by(self, epoch: int) -> float:
        """Highest validation score of the first epochs; a resumed candidate may have had more."""
        return max((score for n, _, score in self.curve if n <= epoch), default=-1.0)

    def stale(self, patience: int) -> bool:
        """Whether the validation score has not risen for ``patience`` epochs."""
        return self.epoch - self.best_epoch >= patience


class Trainer:
    """Trains candidates on the same data, one after another.

    Args:
        train, valid, valid_target_U: as `search` has them.
        threads: CPU threads for torch in this process; None leaves them.
        clock: seconds.
    """

    def __init__(
        self,
        params: SasrecParams,
        train: Sequences,
        valid: Sequences,
        valid_target_U: np.ndarray,
        threads: int | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._params, self._train, self._clock = params, train, clock
        self._valid, self._valid_target_U = valid, valid_target_U
        if threads:
            torch.set_num_threads(threads)

    def __call__(self, candidate: Candidate, epochs: int, seconds: float) -> Iterator[Candidate]:
        """The candidate after every epoch, until it has ``epochs``, is stale, or time is up."""
        deadline = self._clock() + seconds
        while candidate.epoch < epochs and not candidate.stale(self._params.patience):
            if self._clock() >= deadline:
                return
            loss = train_epoch(candidate, self._train, self._params, deadline, self._clock)
            score = validation_ndcg(candidate.model, self._valid, self._valid_target_U)
            if score > candidate.best_score:
                candidate.best_score, candidate.best_epoch = score, candidate.epoch
                candidate.best_state = {
                    name: value.clone() for name, value in candidate.model.state_dict().items()
                }
            candidate.curve.append((candidate.epoch, loss, score))
            yield candidate


@dataclass(frozen=True)
class Search:
    """All candidates, the chosen one, and whether the clock ended the search."""

    best: Candidate
    candidates: list[Candidate]
    cut_short: bool


def search(
    params: SasrecParams,
    num_items: int,
    train: Sequences,
    valid: Sequences,
    valid_target_U: np.ndarray,
    seed: int,
    log: Log,
    clock: Clock = time.monotonic,
    checkpoints: Path | None = None,
    keep: Callable[[Path], None] = lambda file: None,
    run: RunJobs | None = None,
) -> Search:
    """Tune and train.

    Args:
        train: training sequences.
        valid, valid_target_U: histories and the int item index that followed each.
        log: called after every epoch with metrics (``progress``: share of the epochs planned at
            most) and the number of epochs so far.
        clock: seconds; a test gives its own.
        checkpoints: folder in which every candidate is kept after each epoch; the same call goes
            on from there and ends with the same bits.
        keep: called with every file that was written there.
        run: does the jobs of `Trainer`, ``params.workers`` at once; None: here, one after another.

    Returns:
        the candidates; weights of the best validation score are in ``best.best_state``.
    """
    workers = 1 if run is None else params.workers
    run = run or in_turn(Trainer(params, train, valid, valid_target_U, clock=clock))
    candidates = [
        make_candidate(params, num_items, number, seed, *cell)
        for number, cell in enumerate(params.grid.cells())
    ]
    spent = max(checkpoint.restore(c, checkpoints) for c in candidates) if checkpoints else 0.0
    start, limit = clock() - spent, 60 * params.max_minutes
    steps = len(
        epoch_windows(train, params.max_length, params.batch_size, np.random.default_rng(seed))
    )
    rung_epochs = max(1, min(params.rung_epochs, round(RUNG_STEPS / max(1, steps))))
    slots = planned_epochs(len(candidates), rung_epochs)
    at_most = sum(map(sum, slots)) + max(0, params.max_epochs - sum(rung[0] for rung in slots))
    epochs_done, cut_short = sum(c.epoch for c in candidates), False

    def advance(numbers: list[int], epochs: int, deadlines: list[float]) -> None:
        nonlocal epochs_done, cut_short
        jobs = {
            number: lambda number=number, until=until: (candidates[number], epochs, until - clock())
            for number, until in zip(numbers, deadlines, strict=True)
        }
        for number, candidate in run(jobs):
            candidates[number] = candidate
            epochs_done += 1
            if checkpoints:
                keep(checkpoint.save(candidate, clock() - start, checkpoints))
            _, loss, score = candidate.curve[-1]
            log(
                {
                    "loss": loss,
                    "valid_ndcg_at_10": score,
                    "candidate": number,
                    "seconds": clock() - start,
                    "progress": epochs_done / at_most,
                },
                epochs_done,
            )
        cut_short |= any(
            c.cut or (c.epoch < epochs and not c.stale(params.patience))
            for c in (candidates[number] for number in numbers)
        )

    # Where the clock must be obeyed, every slot of the plan gets its part of the rungs' time, so
    # that slowness thins out all candidates alike; as many slots as there are workers share a part.
    parts = sum(rung[0] * -(-len(rung) // workers) for rung in slots)
    alive, past, goal = list(range(len(candidates))), 0, 0
    for rung in slots:
        goal += rung[0]
        ends = [past + rung[0] * (1 + place // workers) for place in range(len(rung))]
        past = ends[-1]
        advance(alive, goal, [start + RUNG_TIME * limit * end / parts for end in ends])
        alive = sorted(alive, key=lambda n: (-candidates[n].score_by(goal), n))
        alive = alive[: -(-len(alive) // 2)]
    advance(alive, params.max_epochs, [start + limit])
    best = max(candidates, key=lambda c: (c.best_score, -c.number))
    # A limit so short that nothing was validated still leaves weights.
    best.best_state = best.best_state or dict(best.model.state_dict())
    return Search(best, candidates, cut_short)


def planned_epochs(candidates: int, rung_epochs: int) -> list[list[int]]:
    """Epochs of every candidate that is alive in every rung: each rung doubles what was trained."""
    slots, alive, trained = [], candidates, 0
    while alive > 1:
        more = max(rung_epochs, trained)
        slots.append([more] * alive)
        trained += more
        alive = -(-alive // 2)
    return slots


def make_candidate(
    params: SasrecParams,
    num_items: int,
    number: int,
    seed: int,
    learning_rate: float,
    dropout: float,
    width: int,
    tied: bool,
) -> Candidate:
    """A fresh model and its optimiser."""
    config = SasrecConfig(
        num_items=num_items,
        width=width,
        blocks=params.blocks,
        heads=params.heads,
        max_length=params.max_length,
        dropout=dropout,
        tied=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Sasrec(config)
    optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.98))
    return Candidate(number, learning_rate, model, optimiser, seed)


def train_epoch(
    candidate: Candidate, train: Sequences, params: SasrecParams, deadline: float, clock: Clock
) -> float:
    """One pass over the training sequences, cut off at ``deadline``; returns the mean loss."""
    model, optimiser = candidate.model, candidate.optimiser
    rng = np.random.default_rng([candidate.seed, candidate.epoch])
    total, count = 0.0, 0
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        for batch in epoch_windows(train, params.max_length, params.batch_size, rng).batches():
            if clock() >= deadline:
                candidate.cut = True
                break
            items_BL = torch.from_numpy(batch.items_BL)
            positive_BL = torch.from_numpy(batch.positive_BL)
            length_B = torch.from_numpy(batch.length_B)
            target_BL = items_BL[:, 1:]
            wanted_BL = torch.arange(1, items_BL.shape[1]) < length_B[:, None]
            if params.targets == "positive":
                wanted_BL = wanted_BL & positive_BL[:, 1:]
            if not wanted_BL.any():
                continue
            state_BLD = model(items_BL[:, :-1], positive_BL[:, :-1])
            target_M = target_BL[wanted_BL]
            loss = full_softmax_loss(state_BLD[wanted_BL], model.output_weight, target_M)
            candidate.step += 1
            for group in optimiser.param_groups:
                group["lr"] = candidate.learning_rate * min(1.0, candidate.step / WARMUP_STEPS)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            total += float(loss.detach()) * len(target_M)
            count += len(target_M)
    candidate.epoch += 1
    return total / max(1, count)


@torch.inference_mode()
def validation_ndcg(
    model: Sasrec, valid: Sequences, target_U: np.ndarray, batch_size: int = 256
) -> float:
    """Mean NDCG@10 of the targets among all items, history not masked.

    Equal scores rank the target last among them, and what is no number ranks nothing: neither a
    constant nor a diverged model scores.

    With one relevant item NDCG@K is ``1 / log2(1 + rank)`` if the rank is at most K, else 0.
    """
    model.eval()
    gain = 0.0
    # Users of similar length together: less padding.
    by_length_U = np.argsort(valid.end_U - valid.start_U, kind="stable")
    for start in range(0, len(valid), batch_size):
        rows = by_length_U[start : start + batch_size]
        batch = newest_windows(valid, model.config.max_length, rows)
        scores_BN = model.last_scores(
            torch.from_numpy(batch.items_BL),
            torch.from_numpy(batch.positive_BL),
            torch.from_numpy(batch.length_B),
        )
        target_B1 = torch.from_numpy(target_U[rows].astype(np.int64))[:, None]
        # The target counts itself; nothing is as good as a score that is not a number.
        rank_B = (scores_BN >= scores_BN.gather(1, target_B1)).sum(1)
        ranked_B = (rank_B >= 1) & (rank_B <= SELECTION_K)
        gain += float((1 / torch.log2(1.0 + rank_B))[ranked_B].sum())
    return gain / max(1, len(valid))
