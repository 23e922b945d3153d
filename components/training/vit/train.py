"""The training loop of one worker: plain PyTorch, which a caller wraps for data parallelism.

It reports through callbacks and never starts or finds other workers itself; with several, the
caller has set up ``torch.distributed`` and gives ``wrap`` (DDP). What a step does is a function of
(weights, optimiser, seed, step): the sampler says which images it has, their views are functions
of (seed, epoch, image), and dropout and stochastic depth are seeded by the step. So a run resumed
after any epoch ends with the same bits as one that was never stopped. Without dropout and
stochastic depth, any number of workers gives the same losses up to the order of floating-point
sums.

Shapes: b images of a worker's batch, C colours, H height, W width, K classes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.pipeline.errors import StageError
from components.pipeline.moments import restore_moments
from components.training.vit.augment import Views, views
from components.training.vit.data import Images, Normalisation
from components.training.vit.evaluate import Evaluation, evaluate
from components.training.vit.model import Vit
from components.training.vit.sampler import Batch, Epoch, Sampler
from components.training.vit.train_state import TrainState, keep, save_state

if TYPE_CHECKING:
    from components.training.vit.config import TrainConfig, VitConfig

#: Between looks at the loss, each of which waits for the device.
CHECK_EVERY_STEPS = 50

Log = Callable[[Mapping[str, float], int], None]
Save = Callable[[Path], None]
Checkpoint = Callable[[Mapping[str, float], Save | None], None]
#: Makes of logits [b, K], targets [b] and features [b, D] what the sampler records.
Forward = Callable[[Tensor, Tensor, Tensor], object]


@dataclass(frozen=True)
class TrainingData:
    """What a worker trains on.

    Attributes:
        train: images that the sampler numbers.
        valid: images that are validated on.
        normalisation: of `train`.
        held_out: images whose loss a sampler that asks for it is told; no figure is of them.
    """

    train: Images
    valid: Images
    normalisation: Normalisation
    held_out: Images | None = None

    @classmethod
    def of(cls, train: Images, valid: Images, held_out: Images | None = None) -> TrainingData:
        """With the normalisation of the training images."""
        return cls(train, valid, Normalisation.of(train), held_out)

    def to(self, device: str) -> TrainingData:
        """All images on a device."""
        held_out = None if self.held_out is None else self.held_out.to(device)
        return TrainingData(
            self.train.to(device), self.valid.to(device), self.normalisation, held_out
        )


def learning_rate_at(step: int, total: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine decay towards nothing at ``total``."""
    warm_up = round(config.warmup_share * total)
    if step < warm_up:
        return config.learning_rate * (step + 1) / warm_up
    # A rule that sizes its epochs itself may take more steps than its schedule says.
    done = min(1.0, (step - warm_up) / max(1, total - warm_up))
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def make_optimiser(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999); weight decay on matrices only, of which the positions are none.

    On a GPU all parameters are updated by one kernel.
    """
    matrices, vectors = list[nn.Parameter](), list[nn.Parameter]()
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() > 1 and name != "position" else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=on_gpu or None)


def sample_losses(logit_bK: Tensor, seen: Views, smoothing: float) -> Tensor:
    """Cross-entropy with label smoothing, of mixed images by their shares: float32 [b]."""

    def of(label_b: Tensor) -> Tensor:
        return F.cross_entropy(
            logit_bK.float(), label_b, reduction="none", label_smoothing=smoothing
        )

    loss_b = of(seen.label_B)
    if seen.partner_B is None or seen.share_B is None:
        return loss_b
    return torch.lerp(of(seen.partner_B), loss_b, seen.share_B)


def train(
    model_config: VitConfig,
    data: TrainingData,
    config: TrainConfig,
    sampler: Sampler,
    *,
    forward: Forward = lambda logit_bK, label_b, feature_bD: None,
    device: str = "cpu",
    wrap: Callable[[nn.Module], Any] = lambda model: model,
    log: Log = lambda metrics, step: None,
    checkpoint: Checkpoint = lambda metrics, save: None,
    restore: TrainState | None = None,
) -> TrainState:
    """Train on this worker's share of every batch of the sampler's epochs.

    Args:
        sampler: says how many epochs there are and how large a batch is; rank and world size too.
        forward: makes what the sampler records; one that records nothing needs none.
        wrap: what runs the forward pass in training: ``DistributedDataParallel`` and, inside or
            alone, ``torch.compile``; with ``world_size > 1`` the default process group must exist.
        log: receives ``loss`` (nats, of the changed images with smoothed labels), the figures of
            validation, ``learning_rate`` and ``progress`` with the steps done, once an epoch.
        checkpoint: called by every rank after every epoch with its metrics, and on rank 0 with a
            function that writes the state into a folder (else None).
        restore: state to go on from.

    Returns:
        the final state, on every rank the same.

    Raises:
        StageError: the loss is no longer a number.
        ValueError: the sampler asks for the loss on held-out images and there are none.
    """
    if sampler.selector.wants_validation and data.held_out is None:
        raise ValueError("the sampler's rule is judged on images held out for it: give held_out")
    state = restore or TrainState()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Vit(model_config)
        if restore:
            model.load_state_dict(state.weights)
            sampler.restore(state.sampler)
        model.to(device)
        run = _Run(model, wrap(model), data.to(device), config, sampler, forward)
        restore_moments(model, run.optimiser, state.moments)
        epochs = sampler.selector.schedule.epochs
        for epoch in sampler.epochs():
            loss, rate = run.epoch(epoch, state)
            epoch.finish()
            if sampler.selector.wants_validation and run.data.held_out:
                sampler.selector.judge(run.evaluate(run.data.held_out).loss)
            state.epoch = epoch.number
            metrics = {"epoch": float(epoch.number), "loss": loss, "learning_rate": rate}
            if epoch.number % config.evaluate_every == 0 or epoch.number == epochs:
                found = run.evaluate(run.data.valid).metrics()
                require_finite(found["valid_loss"], state.step)
                metrics |= found
            state.curve.append({"step": float(state.step), **metrics})
            state.sampler = sampler.state()
            log({**metrics, "progress": epoch.number / epochs}, state.step)
            checkpoint(metrics, run.saver(state) if sampler.rank == 0 else None)
    keep(state, model, run.optimiser)
    return state


class _Run:
    """What an epoch of one worker works with."""

    def __init__(
        self,
        model: Vit,
        wrapped: Any,
        data: TrainingData,
        config: TrainConfig,
        sampler: Sampler,
        forward: Forward,
    ) -> None:
        self.model, self.wrapped, self.data, self.config = model, wrapped, data, config
        self.sampler, self.forward = sampler, forward
        self.optimiser = make_optimiser(model, config)
        self.total = sampler.selector.schedule.steps(sampler.batch_size)

    def epoch(self, epoch: Epoch, state: TrainState) -> tuple[float, float]:
        """Mean loss of its images, of all workers, and the last learning rate."""
        device = self.model.position.device
        sum_1, count, rate = torch.zeros(1, dtype=torch.float64, device=device), 0, 0.0
        for batch in epoch:
            rate = learning_rate_at(state.step, self.total, self.config)
            sum_1 += self.step(epoch, batch, state.step, rate)
            count += batch.size
            state.step += 1
            if state.step % CHECK_EVERY_STEPS == 0:
                require_finite(self._over_workers(sum_1) / count, state.step)
        loss = self._over_workers(sum_1) / max(1, count)
        require_finite(loss, state.step)
        return loss, rate

    def step(self, epoch: Epoch, batch: Batch, step: int, rate: float) -> Tensor:
        """One update; the sum of this worker's weighted losses, float64."""
        config, sampler = self.config, self.sampler
        seen = views(
            self.data.train,
            batch.index_b,
            self.data.normalisation,
            config.augment,
            config.seed,
            epoch.number,
        )
        weight_b = torch.from_numpy(batch.weight_b).to(seen.label_B.device)
        # Random branches are a function of the step: nothing of a generator's state must be kept.
        entropy = [config.seed, step, sampler.rank]
        torch.manual_seed(np.random.SeedSequence(entropy).generate_state(1)[0].item())
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.wrapped.train()
        with torch.autocast("cuda", torch.bfloat16, enabled=seen.image_BCHW.is_cuda):
            logit_bK, feature_bD = self.wrapped(seen.image_BCHW, with_feature=True)
        loss_b = sample_losses(logit_bK, seen, config.label_smoothing)
        total = (loss_b * weight_b).sum()
        self.optimiser.zero_grad(set_to_none=True)
        # Workers' gradients are averaged, and what is wanted is their sum.
        (total / batch.size * sampler.world_size).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimiser.step()
        epoch.record(batch, self.forward(logit_bK.detach(), seen.label_B, feature_bD.detach()))
        return total.detach().double()

    def evaluate(self, images: Images) -> Evaluation:
        return evaluate(
            self.model,
            images,
            self.data.normalisation,
            self.sampler.rank,
            self.sampler.world_size,
        )

    def saver(self, state: TrainState) -> Save:
        def save(folder: Path) -> None:
            keep(state, self.model, self.optimiser)
            save_state(state, folder)

        return save

    def _over_workers(self, sum_1: Tensor) -> float:
        if self.sampler.world_size > 1:
            sum_1 = sum_1.clone()
            torch.distributed.all_reduce(sum_1)
        return float(sum_1)


def require_finite(loss: float, step: int) -> None:
    """Raise StageError if a loss is not a number."""
    if not math.isfinite(loss):
        raise StageError(
            f"the loss is {loss} at step {step}",
            where="training of a vision transformer",
            remedy="lower learning_rate, or clip",
        )
