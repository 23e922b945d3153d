"""Trainings of the architecture benchmark: what each is, on what data, and what is kept of them.

A training is a `Job`: one cell under one rule with one seed. Its figures are a line of a file that
only grows, so whatever was trained before a benchmark was cut is not trained again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import cifar10
from benchmarks.processes import one_thread_each

if TYPE_CHECKING:
    from components.curation.asp.nas_cell import Architecture
    from components.curation.asp.nas_train import CellTrainer, Labelled
    from components.curation.asp.selector import Selector

#: All data; ASP-R; an even subset drawn anew for every epoch; all data for fewer epochs.
FULL, ASP_R, EVEN, SHORT = "full", "asp_r", "dynamic_random", "short_full"
PROXIES = (ASP_R, EVEN, SHORT)
NODES = 3

Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much is trained on what.

    Attributes:
        dataset: its name in the table: CIFAR-10, or the digits of scikit-learn.
        train, valid, test: images, at most.
        edge: of an image, in pixels.
        every: a cell of so many is trained.
        table_seeds: of trainings on all data.
        proxy_seeds: of trainings by rules; others, or proxies would begin with the same weights.
        mirrored: images may be seen from behind.
    """

    dataset: str
    train: int
    valid: int
    test: int
    edge: int
    channels: int
    epochs: int
    every: int
    table_seeds: tuple[int, ...]
    proxy_seeds: tuple[int, ...]
    ratios: tuple[float, ...]
    mirrored: bool
    batch_size: int = 64


class Job(NamedTuple):
    """One training; ``ratio`` is the share of the samples, 1 of all data."""

    rule: str
    ratio: float
    seed: int
    architecture: str

    @property
    def key(self) -> str:
        return f"{self.rule} {self.ratio:g} {self.seed} {self.architecture}"


@dataclass(frozen=True)
class Place:
    """Where what was trained is kept, and the data: the folder of CIFAR-10, None: digits."""

    folder: Path
    data: Path | None
    size: Size


def place_in(home: Path, data: Path | None, size: Size) -> Place:
    """Of this code, data and size: if one of them differs, nothing of another place is taken."""
    from components.pipeline.code_digest import closure_digests, combined_digest

    modules = ("benchmarks.nas_runs", "benchmarks.cifar10")
    made_of = [combined_digest(closure_digests(module)) for module in modules]
    if data is not None:
        made_of.append(hashlib.sha256((data / cifar10.FILE).read_bytes()).hexdigest())
    key = hashlib.sha256(json.dumps([made_of, asdict(size)]).encode()).hexdigest()[:12]
    folder = home / f"nas_table_{key}"
    folder.mkdir(parents=True, exist_ok=True)
    return Place(folder, data, size)


def architectures(size: Size) -> list[Architecture]:
    """Those that are trained."""
    from components.curation.asp.nas_cell import all_architectures

    return list(all_architectures(NODES))[:: size.every]


def jobs_of(size: Size) -> Iterator[Job]:
    """All trainings: those of the table first."""
    arms = [(FULL, 1.0, seed) for seed in size.table_seeds]
    arms += [(r, ratio, s) for s in size.proxy_seeds for ratio in size.ratios for r in PROXIES]
    for arm in arms:
        for architecture in architectures(size):
            yield Job(*arm, str(architecture))


class Journal:
    """Figures of finished trainings by key, in a file of lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.known: dict[str, Figures] = {}
        whole, _, _ = file.read_text().rpartition("\n") if file.exists() else ("", "", "")
        for line in whole.splitlines():
            key, figures = json.loads(line)
            self.known[key] = figures
        # A line that was cut would end in the next one.
        unfinished = file.with_name(f"{file.name}.unfinished")
        unfinished.write_text(f"{whole}\n" if whole else "")
        unfinished.replace(file)

    def add(self, key: str, figures: Figures) -> None:
        with self._file.open("a") as lines:
            lines.write(json.dumps([key, figures]) + "\n")
        self.known[key] = figures


def train_all(place: Place, jobs: Iterable[Job]) -> dict[str, Figures]:
    """Figures of all jobs by key; those not there yet are trained, a process of a thread a core."""
    journal = Journal(place.folder / "runs.jsonl")
    left = [job for job in jobs if job.key not in journal.known]
    with one_thread_each(len(left)) as pool:
        waiting = {pool.submit(train, place, job): job for job in left}
        for done in as_completed(waiting):
            journal.add(waiting[done].key, done.result())
    return journal.known


def train(place: Place, job: Job) -> Figures:
    """Train a cell: on all data for a row of the table, by a rule for what a search would see.

    ``seconds`` are of processor time, with selection and validation. Of all data they begin and end
    as those of a rule; ``train_seconds`` are without validation.
    """
    from components.curation.asp.evaluator import ProxyEvaluator

    size, (trainer, test) = place.size, trainer_of(place)
    if job.rule == FULL:
        return _row(trainer, test, job, size)
    evaluator = ProxyEvaluator(
        trainer, lambda seed: rule_of(job.rule, job.ratio, seed, size), size.batch_size
    )
    outcome = evaluator({"architecture": job.architecture}, job.seed)
    return {
        "valid_accuracy": outcome.metric,
        "seconds": outcome.seconds,
        "samples": outcome.samples,
    }


def _row(trainer: CellTrainer, test: Labelled, job: Job, size: Size) -> Figures:
    from components.curation.asp.nas_cell import Architecture
    from components.curation.asp.nas_network import cost
    from components.curation.asp.nas_train import accuracy
    from components.curation.asp.sampler import Sampler

    sampler = Sampler(rule_of(EVEN, 1.0, job.seed, size), size.batch_size)
    begin = time.process_time()
    network = trainer.fit(Architecture.parse(job.architecture), sampler)
    trained = time.process_time()
    valid = accuracy(network, trainer.valid)
    seconds = time.process_time() - begin
    return {
        "architecture": job.architecture,
        "dataset": size.dataset,
        "seed": job.seed,
        "epochs": size.epochs,
        "train_accuracy": accuracy(network, trainer.train),
        "valid_accuracy": valid,
        "test_accuracy": accuracy(network, test),
        "train_seconds": trained - begin,
        **cost(network, size.edge)._asdict(),
        "seconds": seconds,
        "samples": sampler.samples,
    }


def rule_of(name: str, ratio: float, seed: int, size: Size) -> Selector:
    """A fresh rule."""
    from components.curation.asp.asp_r import AspR
    from components.curation.asp.config import AspConfig, ScheduleConfig
    from components.curation.asp.rules import Even, shorter
    from components.curation.asp.schedule import Schedule

    schedule = Schedule.of(ScheduleConfig(ratio=ratio), size.train, size.epochs)
    if name == ASP_R:
        return AspR(schedule, seed, config=AspConfig())
    return Even(shorter(schedule) if name == SHORT else schedule, seed)


@functools.cache
def trainer_of(place: Place) -> tuple[CellTrainer, Labelled]:
    """Training and validation data in a trainer, and the test data: read once a process."""
    from components.curation.asp.nas_train import CellTrainer

    size = place.size
    train, valid, test = _digits(size) if place.data is None else _images(place.data, size)
    return CellTrainer(train, valid, cifar10.CLASSES, size.channels, mirrored=size.mirrored), test


def _images(folder: Path, size: Size) -> list[Labelled]:
    from components.curation.asp.nas_train import Labelled

    ids = cifar10.image_ids(folder, cifar10.TRAIN_GROUPS)
    rows = cifar10.by_hash(ids, size.train + size.valid)
    seen = cifar10.read_images(folder, cifar10.TRAIN_GROUPS, size.edge, rows)
    train, valid = seen.part(0, size.train), seen.part(size.train, len(rows))
    test = cifar10.read_images(folder, cifar10.TEST_GROUPS, size.edge).part(0, size.test)
    return [Labelled(part.standardised(train), part.label_N) for part in (train, valid, test)]


def _digits(size: Size) -> list[Labelled]:
    """Grey images of 8 times 8 pixels, three times the same colour."""
    import torch
    from sklearn.datasets import load_digits

    from components.curation.asp.nas_train import Labelled

    pixel_ND, label_N = load_digits(return_X_y=True)
    x_NCHW = torch.from_numpy(pixel_ND / 8 - 1).float().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    sizes = [size.train, size.valid, size.test]
    x_parts = x_NCHW[: sum(sizes)].split(sizes)
    labels = torch.from_numpy(label_N)[: sum(sizes)].split(sizes)
    return [Labelled(x, label) for x, label in zip(x_parts, labels, strict=True)]
