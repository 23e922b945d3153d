"""A replica's work: it loads the model, warms it up, and answers requests in batches.

Knows nothing of HTTP. The state goes one way: loading, ready, draining; or failed.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.pipeline.errors import HardwareError, ReelflowError
from components.serving.batching import Batcher, BatchLimits, percentile_ms
from components.serving.schema import Event, Request, requests_table

#: How often a replica looks whether the catalogue changed or the service ends.
LOOKS_EVERY_S = 0.1
#: How long a replica that ends answers what waits.
DRAINS_WITHIN_S = 20.0
#: Requests of the warm-up: kernels are chosen and memory is found at the first calls.
WARM_SIZES, WARM_ROUNDS = (1, 4, 1), 3

Ranked = list[tuple[int, float]]


@dataclass(frozen=True)
class Wanted:
    """A request as it waits in the queue."""

    request: Request
    top_n: int


@dataclass(frozen=True)
class Deployed:
    """What a replica is told.

    Attributes:
        files: folder with the folders of the artifacts that make the model.
        journal: folder of what came after the model.
        end_mark: a file that is there while the service ends.
        beams: width of the beam where a request names none.
        threads: of torch.
        device: ``cpu`` or ``cuda``, the one GPU that the replica has been given.
    """

    model: str
    version: str
    files: str
    journal: str
    end_mark: str
    beams: int
    threads: int
    limits: BatchLimits = field(default_factory=BatchLimits)
    device: str = "cpu"


class NotReady(Exception):
    """The replica is loading, ends, or could not load."""


class Engine:
    """One replica's model, catalogue and queue."""

    def __init__(self, deployed: Deployed) -> None:
        self.deployed = deployed
        self.state, self.problem = "loading", ""
        self._began = time.monotonic()
        self._catalogue: Any = None
        self._batcher: Batcher[Wanted, Ranked] | None = None
        #: Set once it is known whether the model can be served.
        self.settled = threading.Event()
        threading.Thread(target=self._live, name="engine", daemon=True).start()

    @property
    def catalogue(self) -> Any:
        """The live `Catalogue`.

        Raises:
            NotReady: there is none yet, or no longer.
        """
        if self.state != "ready":
            raise NotReady(self.problem or f"the service is {self.state}")
        return self._catalogue

    def submit(
        self, requests: Sequence[Request], top_n: int, beams: int | None, wait_s: float
    ) -> list[Future[Ranked]]:
        """Queue requests; their lists come in the futures.

        Raises:
            NotReady, Overloaded: nothing was queued.
        """
        if self.state != "ready" or self._batcher is None:
            raise NotReady(self.problem or f"the service is {self.state}")
        wanted = [Wanted(request, top_n) for request in requests]
        return self._batcher.submit(wanted, beams or self.deployed.beams, wait_s)

    def figures(self) -> dict[str, Any]:
        """The model, its catalogue, and what became of the requests of this replica."""
        deployed, batcher = self.deployed, self._batcher
        said: dict[str, Any] = {
            "model": deployed.model,
            "version": deployed.version,
            "state": self.state,
            "beams": deployed.beams,
            "uptime_s": round(time.monotonic() - self._began, 3),
        }
        if self._catalogue is None or batcher is None:
            return said
        now, counts = self._catalogue.now, batcher.counts
        seconds = list(counts.seconds)
        return said | {
            "semantic_ids": {"version": self._catalogue.version, "levels": self._catalogue.levels},
            "catalogue": {
                "recommendable": now.recommendable,
                "new": now.new,
                "withdrawn": now.withdrawn,
                "outdated": now.outdated,
            },
            "requests": {
                name: getattr(counts, name)
                for name in ("answered", "refused", "expired", "cancelled", "failed")
            },
            "batches": counts.batches,
            "waiting": batcher.waiting,
            "requests_per_second": round(batcher.rate, 3),
            "latency_ms": {
                "p50": percentile_ms(seconds, 0.50),
                "p99": percentile_ms(seconds, 0.99),
                "of": len(seconds),
            },
        }

    def answer(self, wanted: list[Wanted], beams: int) -> list[Ranked]:
        """Lists of requests of one beam width, on one state of the catalogue."""
        served = self._catalogue.now.served
        # What was seen is left out afterwards, so as many more are asked for.
        seen = [w.request.seen() if w.request.exclude_seen else set() for w in wanted]
        longest = max(w.top_n + len(s) for w, s in zip(wanted, seen, strict=True))
        table = requests_table([w.request for w in wanted])
        answers = served.recommend(table, top_n=longest, beams=beams)
        rows = zip(answers["item_ids"].to_pylist(), answers["scores"].to_pylist(), strict=True)
        return [
            [pair for pair in zip(*row, strict=True) if pair[0] not in s][: w.top_n]
            for row, w, s in zip(rows, wanted, seen, strict=True)
        ]

    def _live(self) -> None:
        """Load, then keep up with the journal until the service ends."""
        end = Path(self.deployed.end_mark)
        answers = answers_mark(end, os.getpid())
        try:
            self._load()
            # The mark before the look at the end: whoever ends the service sees the one, or this
            # replica the other, and nothing is taken that nobody waits for.
            answers.touch()
            if not end.exists():
                self.state = "ready"
            self.settled.set()
            while not end.exists():
                time.sleep(LOOKS_EVERY_S)
                self._look()
            self.state = "draining"
            if self._batcher is not None:
                self._batcher.close()
                self._batcher.join(DRAINS_WITHIN_S)
        except Exception as error:
            self.state, self.problem = "failed", _said(error)
            self.settled.set()
        answers.unlink(missing_ok=True)

    def _look(self) -> None:
        # A table that cannot be read is told at /readyz and to whoever changes it; what was there
        # serves on, and the end of the service is still looked for.
        try:
            self._catalogue.refresh()
            self.problem = ""
        except Exception as error:
            self.problem = _said(error)

    def _load(self) -> None:
        import torch

        from components.evaluation.registration.serving import ENCODER_FILES, MODEL_FILES
        from components.serving.catalogue import Catalogue
        from components.serving.journal import Journal

        torch.set_num_threads(self.deployed.threads)
        files = {n: Path(self.deployed.files) / n for n in MODEL_FILES + ENCODER_FILES}
        journal, device = Journal(Path(self.deployed.journal)), self.deployed.device
        if device == "cuda" and not torch.cuda.is_available():
            raise HardwareError(
                f"torch {torch.__version__} finds no GPU here",
                where="--gpu",
                remedy="leave it out to serve on the processor; reelflow doctor shows what is here",
            )
        self._catalogue = Catalogue(files, journal, device)
        served = self._catalogue.now.served
        events = [Event(item_id=int(i), timestamp_ms=None) for i in served.item_id_N[:64]]
        for size in WARM_SIZES:
            wanted = [Wanted(Request(history=events), top_n=20)] * size
            for _ in range(WARM_ROUNDS):
                self.answer(wanted, self.deployed.beams)
        # What is there now stays: collecting it again and again would hold requests up.
        gc.collect()
        gc.freeze()
        self._batcher = Batcher(self.answer, self.deployed.limits)


def begun_mark(end_mark: Path) -> Path:
    """The file that is there once the service has begun to answer."""
    return end_mark.with_name("begun")


def answers_mark(end_mark: Path, process: int | str) -> Path:
    """The file that is there while a replica answers requests, until the last is answered."""
    return end_mark.with_name(f"answers-{process}")


def answering(end_mark: Path) -> int:
    """How many replicas answer requests; one that was killed left its mark, and is none."""
    import psutil

    marks = end_mark.parent.glob(answers_mark(end_mark, "*").name)
    return sum(psutil.pid_exists(int(mark.name.partition("-")[2])) for mark in marks)


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ReelflowError) else repr(error)
