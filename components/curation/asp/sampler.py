"""A rule inside a training loop, of one process or of data-parallel ones.

Each rank holds the whole state, draws the same subset, and takes its share of every global batch;
at the end of an epoch all ranks give each other what they saw, and update alike. So a kill does not
change what is trained on, nor does the number of ranks where it does not change the signals (sums
of gradients in another order do, in their last bits). What a batch showed stays on its device until
then: one transfer an epoch.

    for epoch in sampler.epochs():
        for batch in epoch:
            loss_b, forward = step(batch.index_b)        # loss of each sample
            (loss_b * batch.weight_b).sum() / batch.size  → backward
            epoch.record(batch, forward)
        manifest = epoch.finish()

Shapes: b samples of a rank's batch, S of the subset, N of all data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from components.curation.asp.draw import shuffled
from components.curation.asp.selector import Diverged, Manifest, Seen, Selector, State, Subset
from components.curation.asp.signals import Forward, signals_of

Int64 = npt.NDArray[np.int64]

#: Logits that are held until their signals are computed: 16 MiB.
HELD = 1 << 22
#: The fact of a state that holds what its epochs cost, as JSON.
MANIFESTS = "manifests"


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch; all ranks have equally many samples.

    Attributes:
        index_b: int64 samples; repeats fill up where the global batch cannot be shared out.
        weight_b: float32 weight of each loss, 0 of a repeat.
        real_b: bool, no repeat.
        size: samples of the global batch, repeats not counted: the sum of the weighted losses of
            all ranks by it is the batch's loss.
    """

    index_b: Int64
    weight_b: npt.NDArray[np.float32]
    real_b: npt.NDArray[np.bool_]
    size: int


@dataclass
class Sampler:
    """A rule, and which part of its batches is this process's.

    Attributes:
        batch_size: samples of a global batch.
        order: gives a subset's indices in the order of an epoch, by indices, seed and epoch.
        manifests: of the epochs finished, those before a restored state too.
    """

    selector: Selector
    batch_size: int
    rank: int = 0
    world_size: int = 1
    order: Callable[[Int64, int, int], Int64] = shuffled
    manifests: list[Manifest] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.rank < self.world_size:
            raise ValueError(
                f"batch_size={self.batch_size}, rank {self.rank} of world_size={self.world_size}: "
                "a batch has one sample at least, ranks count from 0"
            )

    @property
    def samples(self) -> int:
        """Samples trained on by the epochs finished, of all ranks."""
        return sum(manifest.samples for manifest in self.manifests)

    def epochs(self) -> Iterator[Epoch]:
        """Those that are left. Each has to be finished before the next one."""
        while self.selector.epoch < self.selector.schedule.epochs:
            number = self.selector.epoch + 1
            epoch = Epoch(self, number, self.selector.select(number))
            yield epoch
            if not epoch.finished:
                raise RuntimeError(f"epoch {number} was left without finish()")

    def state(self) -> State:
        """What a checkpoint needs; between epochs."""
        state = self.selector.state()
        manifests = json.dumps([asdict(manifest) for manifest in self.manifests])
        return replace(state, facts={**state.facts, MANIFESTS: manifests})

    def restore(self, state: State) -> None:
        """Go on after the state's epoch.

        Raises:
            StageError: it is of another rule, seed, schedule or data.
        """
        self.selector.restore(state)
        self.manifests = [Manifest(**m) for m in json.loads(state.facts.get(MANIFESTS, "[]"))]


@dataclass
class Epoch:
    """One pass over a subset."""

    sampler: Sampler
    number: int
    subset: Subset
    finished: bool = False
    _waiting: list[tuple[Batch, Forward]] = field(default_factory=list)
    _held: int = 0
    _seen: list[tuple[Int64, dict[str, Tensor], Tensor]] = field(default_factory=list)
    _finite: list[Tensor] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Global batches."""
        return -(-len(self.subset.index_S) // self.sampler.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        sampler, subset = self.sampler, self.subset
        index_S = sampler.order(subset.index_S, sampler.selector.seed, self.number)
        order_S = np.searchsorted(subset.index_S, index_S)
        for first in range(0, len(order_S), sampler.batch_size):
            place_B = order_S[first : first + sampler.batch_size]
            # Equally many for each rank: all of them take part in every sum of gradients.
            more = -len(place_B) % sampler.world_size
            real_B = np.arange(len(place_B) + more) < len(place_B)
            place_b = np.resize(place_B, len(place_B) + more)[sampler.rank :: sampler.world_size]
            real_b = real_B[sampler.rank :: sampler.world_size]
            weight_b = real_b.astype(np.float32)
            if subset.weight_S is not None:
                weight_b *= subset.weight_S[place_b]
            yield Batch(subset.index_S[place_b], weight_b, real_b, len(place_B))

    def record(self, batch: Batch, forward: Forward) -> None:
        """Keep what the forward pass of a batch showed; its tensors must stay as they are."""
        self._waiting.append((batch, forward.detached))
        self._held += forward.logit_BC.numel()
        if self._held >= HELD:
            self._take()

    def _take(self) -> None:
        """Signals of the batches that wait: those of many at once cost little more than of one."""
        if not self._waiting:
            return
        forward = Forward.joined([forward for _, forward in self._waiting])
        index_b = np.concatenate([batch.index_b for batch, _ in self._waiting])
        real_b = np.concatenate([batch.real_b for batch, _ in self._waiting])
        self._waiting, self._held = [], 0
        self._finite.append(forward.logit_BC.isfinite().all())
        signals = signals_of(forward, self.sampler.selector.signals)
        correct_b = forward.correct_B
        if not real_b.all():
            kept = torch.from_numpy(np.flatnonzero(real_b)).to(correct_b.device)
            signals = {name: x[kept] for name, x in signals.items()}
            correct_b = correct_b[kept]
        self._seen.append((index_b[real_b], signals, correct_b))

    def finish(self) -> Manifest:
        """Update the rule by all that was recorded, by all ranks.

        Raises:
            Diverged: a signal is not a number, or a logit where the rule wants no signals.
            RuntimeError: samples of the subset were not recorded, or twice.
        """
        if self.finished:
            raise RuntimeError(f"epoch {self.number} is finished already")
        self._take()
        names = self.sampler.selector.signals
        index_s = np.concatenate([index for index, _, _ in self._seen] or [np.zeros(0, np.int64)])
        found = {
            name: torch.cat([signals[name] for _, signals, _ in self._seen]).cpu().numpy()
            for name in names
            if self._seen
        }
        correct_s = torch.cat([c for _, _, c in self._seen]).cpu().numpy() if self._seen else None
        finite = not self._finite or bool(torch.stack(self._finite).all())
        parts = [(index_s, found, correct_s, finite)]
        if self.sampler.world_size > 1:
            parts = [parts[0]] * self.sampler.world_size
            dist.all_gather_object(parts, (index_s, found, correct_s, finite))
        # All ranks know of it and end alike.
        if not all(finite for *_, finite in parts) and not names:
            raise Diverged(f"a logit is not a number in epoch {self.number}")
        parts = [part for part in parts if len(part[0])]
        index_S = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in parts)])
        order_S = np.argsort(index_S, kind="stable")
        if not np.array_equal(index_S[order_S], self.subset.index_S):
            raise RuntimeError(
                f"epoch {self.number} recorded {len(index_S)} samples, its subset has "
                f"{len(self.subset.index_S)}: record() every batch once"
            )
        seen = Seen(
            self.subset.index_S,
            {name: np.concatenate([f[name] for _, f, *_ in parts])[order_S] for name in names},
            np.concatenate([c for _, _, c, _ in parts if c is not None])[order_S],
        )
        self.sampler.selector.observe(seen)
        self.finished = True
        manifest = Manifest.of(self.sampler.selector, self.subset)
        self.sampler.manifests.append(manifest)
        return manifest
