"""Tasks and candidates of `proxy_ranking`: small images, variants of them, and small networks.

Shapes: N training images, V validation images, b of a batch, C classes, [channels, side, side] of
an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import cifar10
from components.curation.asp.evaluator import Candidate, Report
from components.curation.asp.sampler import Sampler
from components.curation.asp.signals import Forward
from components.pipeline.errors import StageError

Int64 = npt.NDArray[np.int64]

#: Pixels of height and width.
EDGE = 16
#: Share of the steps in which the rate rises.
WARM_UP = 0.05
#: Share of the labels that are wrong in the variant of that name, and of the images that are easy.
WRONG, EASY = 0.2, 0.5
#: How many times the variant of that name has each image, and the largest class the smallest.
COPIES, IMBALANCE = 5, 50
#: How much of an easy image is the mean of its class.
CLASS_MEAN = 0.7


@dataclass(frozen=True)
class Images:
    """Images with their classes.

    Attributes:
        x_N: float32 [N, channels, side, side], of mean 0 and deviation 1 on the training images.
        y_N: int64.
    """

    x_N: Tensor
    y_N: Tensor

    def __len__(self) -> int:
        return len(self.y_N)

    def take(self, index: npt.NDArray[np.integer]) -> Images:
        return Images(self.x_N[index], self.y_N[index])


@dataclass(frozen=True)
class Task:
    """What candidates are trained on and judged by.

    Attributes:
        valid: all candidates are ranked by it.
        held_out: for rules that ask for a loss; nobody trains on it or is ranked by it.
        classes: how many.
    """

    train: Images
    valid: Images
    held_out: Images
    classes: int


def load_task(train: int, valid: int, held_out: int, data: Path | None) -> Task:
    """Images of CIFAR-10 at 16 × 16, by the hash of their ids; or digits, where there is no folder.

    Raises:
        StageError: there are not so many.
    """
    count = train + valid + held_out
    raw_N, y_N = _digits() if data is None else _cifar10(data, count)
    if len(y_N) < count:
        raise StageError(f"there are {len(y_N)} images, {count} are wanted")
    mean, deviation = raw_N[:train].mean(), raw_N[:train].std()
    sizes = [train, valid, held_out]
    x_N = ((raw_N[:count] - mean) / deviation).split(sizes)
    of_train, of_valid, of_held_out = map(Images, x_N, y_N[:count].split(sizes))
    return Task(of_train, of_valid, of_held_out, classes=10)


def plain(task: Task, rng: np.random.Generator) -> Task:
    """The images as they are."""
    return task


def redundant(task: Task, rng: np.random.Generator) -> Task:
    """A fifth of the images, each five times with jitter: shifted and with noise on it."""
    kept = task.train.take(rng.permutation(len(task.train))[: len(task.train) // COPIES])
    lot = torch.Generator().manual_seed(int(rng.integers(2**31)))
    copies = []
    for _ in range(COPIES):
        x_N = shifted(kept.x_N, *(int(s) for s in rng.integers(-1, 2, 2)))
        copies.append(x_N + 0.1 * torch.randn(x_N.shape, generator=lot))
    return replace(task, train=Images(torch.cat(copies), kept.y_N.repeat(COPIES)))


def imbalanced(task: Task, rng: np.random.Generator) -> Task:
    """The largest class has fifty times the images of the smallest; validation is balanced."""
    y_N = task.train.y_N.numpy()
    most = int(np.bincount(y_N, minlength=task.classes).max())
    kept: list[Int64] = []
    for c in range(task.classes):
        wanted = round(most * IMBALANCE ** (-c / (task.classes - 1)))
        kept.append(rng.permutation(np.flatnonzero(y_N == c))[:wanted])
    return replace(task, train=task.train.take(np.sort(np.concatenate(kept))))


def mislabelled(task: Task, rng: np.random.Generator) -> Task:
    """A fifth of the training labels are those of another class."""
    y_N = task.train.y_N.numpy().copy()
    wrong = rng.permutation(len(y_N))[: round(WRONG * len(y_N))]
    y_N[wrong] = (y_N[wrong] + rng.integers(1, task.classes, len(wrong))) % task.classes
    return replace(task, train=Images(task.train.x_N, torch.from_numpy(y_N)))


def half_easy(task: Task, rng: np.random.Generator) -> Task:
    """Half of the training images are mostly the mean image of their class."""
    x_N, y_N = task.train.x_N.clone(), task.train.y_N
    easy = torch.from_numpy(rng.permutation(len(y_N))[: round(EASY * len(y_N))])
    means = torch.stack([x_N[y_N == c].mean(0) for c in range(task.classes)])
    x_N[easy] = CLASS_MEAN * means[y_N[easy]] + (1 - CLASS_MEAN) * x_N[easy]
    return replace(task, train=Images(x_N, y_N))


#: What is done to the training images; validation is the same for all.
VARIANTS: Mapping[str, Callable[[Task, np.random.Generator], Task]] = {
    "plain": plain,
    "redundant": redundant,
    "imbalanced": imbalanced,
    "mislabelled": mislabelled,
    "half_easy": half_easy,
}


def candidates(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Random points of a space narrowed to rates at which all of them learn."""
    rng = np.random.default_rng(seed)

    def log_uniform(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(math.log(low), math.log(high))))

    found = []
    for _ in range(count):
        optimiser = str(rng.choice(["sgd", "adamw"]))
        found.append(
            {
                "optimiser": optimiser,
                "learning_rate": log_uniform(0.006, 0.1) * (1.0 if optimiser == "sgd" else 0.03),
                "weight_decay": log_uniform(1e-5, 1e-2) * (1.0 if optimiser == "sgd" else 10.0),
                "width": int(rng.choice([64, 128, 256])),
                "depth": int(rng.integers(1, 4)),
                "dropout": float(rng.uniform(0, 0.6)),
                "batch_size": int(rng.choice([64, 128])),
                "augmentation": float(rng.choice([0.0, 0.5, 1.0])),
            }
        )
    return found


class Mlp(nn.Module):
    """Some hidden layers over the pixels."""

    def __init__(self, inputs: int, classes: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in in (inputs, *[width] * (depth - 1)):
            layers += [nn.Linear(width_in, width), nn.ReLU(), nn.Dropout(dropout)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, classes)

    def forward(self, x_b: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the features that the last layer reads."""
        feature_bD = self.body(x_b)
        return self.head(feature_bD), feature_bD


def new_model(task: Task, candidate: Candidate, seed: int) -> Mlp:
    """A candidate's network; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Mlp(
            task.train.x_N[0].numel(),
            task.classes,
            candidate["width"],
            candidate["depth"],
            candidate["dropout"],
        )


def new_optimiser(model: nn.Module, candidate: Candidate) -> torch.optim.Optimizer:
    rate, decay = candidate["learning_rate"], candidate["weight_decay"]
    if candidate["optimiser"] == "sgd":
        return torch.optim.SGD(
            model.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay
        )
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay, foreach=True)


def rate_at(passed: float) -> float:
    """Factor of the rate after a share of the training: a short rise, then a cosine to 0."""
    if passed < WARM_UP:
        return passed / WARM_UP
    return (1 + math.cos(math.pi * (passed - WARM_UP) / (1 - WARM_UP))) / 2


@dataclass(frozen=True)
class Trial:
    """Trains a candidate of a task through the epochs of a rule.

    The rate falls to 0 over the steps really taken, whatever a rule's subsets cost.

    Attributes:
        seed: of weights, dropout and augmentation.
    """

    task: Task
    seed: int

    def __call__(self, candidate: Candidate, sampler: Sampler, report: Report) -> float:
        """Mean accuracy of the classes of the whole validation set after the last step.

        Raises:
            StageError: the loss is not a number.
        """
        return accuracy(self.trained(candidate, sampler), self.task.valid, self.task.classes)

    def trained(self, candidate: Candidate, sampler: Sampler) -> Mlp:
        """The network after the last step.

        Raises:
            StageError: the loss is not a number.
        """
        with torch.random.fork_rng(devices=[]):
            # Of dropout.
            torch.manual_seed(self.seed)
            return self._train(candidate, sampler)

    def _train(self, candidate: Candidate, sampler: Sampler) -> Mlp:
        task = self.task
        model = new_model(task, candidate, self.seed)
        optimiser = new_optimiser(model, candidate)
        epochs = sampler.selector.schedule.epochs
        with_feature = "grand_last" in sampler.selector.signals
        lot = np.random.default_rng(self.seed)
        strength = candidate["augmentation"]
        model.train()
        for epoch in sampler.epochs():
            for step, batch in enumerate(epoch):
                passed = (epoch.number - 1 + (step + 0.5) / epoch.steps) / epochs
                for group in optimiser.param_groups:
                    group["lr"] = candidate["learning_rate"] * rate_at(passed)
                x_b = augmented(task.train.x_N[batch.index_b], strength, lot)
                y_b = task.train.y_N[batch.index_b]
                logit_bC, feature_bD = model(x_b)
                loss_b = F.cross_entropy(logit_bC, y_b, reduction="none")
                loss = (loss_b * torch.from_numpy(batch.weight_b)).sum() / batch.size
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                epoch.record(batch, Forward(logit_bC, y_b, feature_bD if with_feature else None))
            last = float(loss.detach())
            if not math.isfinite(last):
                raise StageError(
                    f"the loss is {last} after epoch {epoch.number} of {dict(candidate)}",
                    remedy="narrow the space of learning rates",
                )
            epoch.finish()
            if sampler.selector.wants_validation:
                sampler.selector.judge(loss_of(model, task.held_out))
        return model


def shifted(x_b: Tensor, down: int, right: int) -> Tensor:
    """Images moved by some pixels; what comes in is 0."""
    padded = F.pad(x_b, (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)))
    side = x_b.shape[-1]
    top, left = max(-down, 0), max(-right, 0)
    return padded[..., top : top + side, left : left + side]


def augmented(x_b: Tensor, strength: float, lot: np.random.Generator) -> Tensor:
    """A batch shifted by up to twice the strength in pixels and, half of the times, mirrored."""
    if not strength:
        return x_b
    if lot.random() < strength / 2:
        x_b = x_b.flip(-1)
    most = round(2 * strength)
    return shifted(x_b, *(int(s) for s in lot.integers(-most, most + 1, 2)))


@torch.no_grad()
def outputs(model: Mlp, images: Images, block: int = 4096) -> tuple[Tensor, Tensor]:
    """Logits and features of all images, without dropout."""
    was_training = model.training
    model.eval()
    found = [model(x_b) for x_b in images.x_N.split(block)]
    model.train(was_training)
    logits, features = zip(*found, strict=True)
    return torch.cat(logits), torch.cat(features)


def accuracy(model: Mlp, images: Images, classes: int) -> float:
    """Mean over the classes that occur of the share of their images that are right."""
    right_V = (outputs(model, images)[0].argmax(1) == images.y_N).double()
    by_class = torch.zeros(classes, dtype=torch.double).index_add(0, images.y_N, right_V)
    return float((by_class / torch.bincount(images.y_N, minlength=classes)).nanmean())


def loss_of(model: Mlp, images: Images) -> float:
    return float(F.cross_entropy(outputs(model, images)[0], images.y_N))


def _cifar10(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """Some of the 45,000 that are not for testing."""
    rows = cifar10.by_hash(cifar10.image_ids(folder, cifar10.TRAIN_GROUPS), count)
    images = cifar10.read_images(folder, cifar10.TRAIN_GROUPS, EDGE, rows)
    return images.pixel_NCHW.float(), images.label_N


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 8 × 8, in an order of our own."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(y))
    return torch.from_numpy(x[order]).float().view(-1, 1, 8, 8), torch.from_numpy(y[order])
