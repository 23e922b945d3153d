"""An HTTP client in a process of its own that does not wait for answers: Poisson arrivals.

Latency is counted from the moment a request was due, not from when it was sent: a client that falls
behind, or a server that makes it wait, is part of what a user feels.

As a program, ``python -m benchmarks.http_load``: one JSON plan on standard input, one JSON outcome
on standard output.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

#: Requests whose answer did not come within this count as failed.
PATIENCE_S = 30.0
#: How long before a request is due the client stops sleeping, which may take longer than asked.
SPIN_S = 0.001


@dataclass(frozen=True)
class Plan:
    """What to send.

    Attributes:
        bodies: JSON documents, taken in turn; none: GET.
        rate: requests a second on average.
        seconds: how long requests are sent.
    """

    url: str
    bodies: list[str]
    rate: float
    seconds: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        latency_ms: of the requests that were answered with 200.
        statuses: how many of each; 0: no answer.
        seconds: from the first request due to the last answer.
    """

    latency_ms: list[float]
    statuses: dict[str, int]
    seconds: float

    @property
    def answered(self) -> float:
        """Share of the requests that were answered with 200."""
        return self.share(200)

    def share(self, status: int) -> float:
        """Share of the requests that were answered with a status."""
        return self.statuses.get(str(status), 0) / max(1, sum(self.statuses.values()))

    @property
    def throughput(self) -> float:
        """Answers a second."""
        return self.statuses.get("200", 0) / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds within which this share of the answered requests was answered."""
        ordered = sorted(self.latency_ms) or [float("nan")]
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def load(plan: Plan) -> Outcome:
    """Carry a plan out in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(asdict(plan)),
        capture_output=True,
        text=True,
        check=True,
    )
    return Outcome(**json.loads(done.stdout))


async def _carry_out(plan: Plan) -> Outcome:
    import aiohttp

    rng = random.Random(plan.seed)
    latency_ms: list[float] = []
    statuses: dict[str, int] = {}
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    connector = aiohttp.TCPConnector(limit=0)
    kind = {"Content-Type": "application/json"}

    async def ask(session: Any, body: str | None, due: float) -> None:
        try:
            method = "GET" if body is None else "POST"
            async with session.request(method, plan.url, data=body, headers=kind) as answer:
                await answer.read()
                status = answer.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            status = 0
        statuses[str(status)] = statuses.get(str(status), 0) + 1
        if status == 200:
            latency_ms.append(1000 * (time.perf_counter() - due))

    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        tasks: list[asyncio.Task[None]] = []
        due = start = time.perf_counter() + 0.05
        while due < start + plan.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter() - SPIN_S))
            while time.perf_counter() < due:
                await asyncio.sleep(0)
            body = plan.bodies[len(tasks) % len(plan.bodies)] if plan.bodies else None
            tasks.append(asyncio.create_task(ask(session, body, due)))
            due += rng.expovariate(plan.rate)
        await asyncio.gather(*tasks)
        return Outcome(latency_ms, statuses, time.perf_counter() - start)


def main() -> None:
    """Carry out the plan on standard input."""
    outcome = asyncio.run(_carry_out(Plan(**json.load(sys.stdin))))
    json.dump(asdict(outcome), sys.stdout)


if __name__ == "__main__":
    main()
