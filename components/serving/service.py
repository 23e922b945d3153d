"""``reelflow serve``: the champion behind HTTP, on Ray Serve, until somebody ends it.

One proxy takes the connections and hands them to the replicas; each replica is a process with the
model, a queue and one computing thread. Whatever is wrong with the call is found before a process
is started. Ctrl-C and SIGTERM end it in order: no new request, answers to those that wait, then the
processes.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.pipeline.errors import HardwareError, StageError, StorageError, UsageError
from components.pipeline.machine import cores, visible_gpus
from components.pipeline.storage import exclusive, is_held
from components.serving.batching import BatchLimits

if TYPE_CHECKING:
    from components.pipeline.settings import Settings
    from components.serving.engine import Deployed

#: Calls that a replica reads at a time; those in the queue are fewer, by `BatchLimits`.
OPEN_CALLS = 100_000
HOST, PORT = "127.0.0.1", 8000
APPLICATION = "recommender"
READY_WITHIN_S = 300.0
ENDS_WITHIN_S = 20.0
POLL_S = 0.1
#: How often the service is looked at while it runs, and how long something may be wrong with it: a
#: replica that dies is started again by Ray, and the others answer meanwhile.
LOOKS_EVERY_S, HEALS_WITHIN_S = 1.0, 120.0
#: How soon Ray notices that a replica died.
HEALTH_CHECK_S = 1.0
#: A small model's products are too short for more threads than these to pay.
MOST_THREADS = 4
#: Before Ray Serve is imported, for all its processes. The replica computes in a thread of its own,
#: so another one for its routes is a hop for nothing; requests are counted here, not logged.
SERVE_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}


@dataclass(frozen=True)
class ServeOptions:
    """What the command says.

    Attributes:
        model, version: None: the champion of the only model that has one.
        port: 0: any free one.
        threads: of torch in each replica; None: what the machine has room for.
        gpu: each replica computes on a GPU of its own.
    """

    model: str | None = None
    version: str | None = None
    host: str = HOST
    port: int = PORT
    replicas: int = 1
    threads: int | None = None
    limits: BatchLimits = field(default_factory=BatchLimits)
    gpu: bool = False


def serve(settings: Settings, options: ServeOptions) -> None:
    """Serve a registered recommender until interrupted.

    Raises:
        UsageError: the port is taken, there is no such model, version or champion, or a cluster
            is named.
        HardwareError: there are fewer GPUs than replicas that want one.
        StorageError: the registry does not answer, or files cannot be fetched.
        StageError: a replica cannot load the model, or the service ended by itself.
    """
    from components.serving.engine import begun_mark

    if settings.ray_address:
        raise UsageError(
            "the service runs on this machine alone",
            where="RAY_ADDRESS",
            remedy="unset it; for more machines start one service on each, behind a load balancer",
        )
    if options.gpu:
        require_gpus(options.replicas)
    port = require_port(options.host, options.port)
    print("  starting; it takes some ten seconds", file=sys.stderr, flush=True)
    with (
        _own_folder(settings.home / "serving" / "running") as own,
        _running(deployed := _deployed(settings, options, own), options, port) as (problem, ending),
    ):
        address, end = f"http://{_bracketed(options.host)}:{port}", Path(deployed.end_mark)
        _wait_until_ready(address, end, options.replicas, ending, problem)
        begun_mark(end).touch()
        if not ending.is_set():
            print(f"  {'serving':<10} {deployed.model} version {deployed.version}")
            print(f"  {'address':<10} {address}/v1/recommend")
            print(f"  {'API':<10} {address}/docs")
            print("  Ctrl-C ends it", flush=True)
        _watch(address, ending, problem)
        print("\n  ending", file=sys.stderr, flush=True)


def _watch(address: str, ending: threading.Event, problem: Callable[[], str | None]) -> None:
    """Return when somebody ends the service.

    Raises:
        StageError: something is wrong with it that does not pass.
    """
    wrong_since: float | None = None
    while not ending.wait(LOOKS_EVERY_S):
        _, said = _readiness(address)
        why = problem() or (said.get("error") if said.get("status") == "failed" else None)
        if why is None:
            wrong_since = None
            continue
        wrong_since = wrong_since or time.monotonic()
        if time.monotonic() - wrong_since > HEALS_WITHIN_S:
            raise StageError(f"the service ended: {why}", where=address)


def require_gpus(replicas: int) -> None:
    """Raise HardwareError if this machine has fewer GPUs than replicas."""
    have = visible_gpus()
    if have < replicas:
        raise HardwareError(
            f"{replicas} replica{'s take' if replicas > 1 else ' takes'} {replicas} "
            f"GPU{'s' if replicas > 1 else ''}, this machine has {have or 'none'}",
            where="--gpu",
            remedy=(f"take fewer replicas (--replicas {have}), or " if have else "")
            + "leave it out to serve on the processor; reelflow doctor shows what is here",
        )


def require_port(host: str, port: int) -> int:
    """The port if it can be listened at; for 0 any free one.

    Raises:
        UsageError: it is taken, and by whom; or the host is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if not isinstance(error, socket.gaierror) and _listener(port):
                raise UsageError(
                    f"the port is taken by {_listener(port)}",
                    where=f"--port {port}",
                    remedy="end it, or give another: --port 0 takes any free one",
                ) from None
            raise UsageError(
                f"cannot listen there: {error.strerror or error}",
                where=f"--host {host} --port {port}",
                remedy="give an address of this machine and a port of your own",
            ) from None
        return int(probe.getsockname()[1])


def _listener(port: int) -> str | None:
    """Who listens at a port."""
    import psutil

    try:
        taken = [
            c
            for c in psutil.net_connections("tcp")
            if c.laddr and c.laddr.port == port and not c.raddr
        ]
    except psutil.Error:
        return "another process"
    for connection in taken:
        try:
            process = psutil.Process(connection.pid)
            return f"process {process.pid} ({' '.join(process.cmdline())[:80] or process.name()})"
        except (psutil.Error, TypeError, ValueError):
            return "a process of another user"
    return None


@contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A folder of this process, gone with the block; those of processes that were killed go too.

    Who lives is told by a lock and not by numbers of processes: those are given again, and services
    in containers with one home have the same.
    """
    name = uuid.uuid4().hex
    with exclusive(parent / f"{name}.lock"):
        own = parent / name
        own.mkdir()
        for folder in parent.iterdir():
            lock = parent / f"{folder.name}.lock"
            if folder.is_dir() and folder != own and not is_held(lock):
                shutil.rmtree(folder, ignore_errors=True)
                lock.unlink(missing_ok=True)
        try:
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


def _deployed(settings: Settings, options: ServeOptions, own: Path) -> Deployed:
    from components.pipeline.tracking import connect
    from components.serving.champion_files import choose
    from components.serving.engine import Deployed

    chosen = choose(connect(settings), options.model, options.version, own)
    return Deployed(
        model=chosen.name,
        version=chosen.number,
        files=str(chosen.files),
        journal=str(settings.home / "serving" / chosen.name),
        end_mark=str(own / "ending"),
        beams=chosen.beams,
        threads=options.threads or max(1, min(MOST_THREADS, (cores() - 1) // options.replicas)),
        limits=options.limits,
        device="cuda" if options.gpu else "cpu",
    )


@contextmanager
def _running(
    deployed: Deployed, options: ServeOptions, port: int
) -> Iterator[tuple[Callable[[], str | None], threading.Event]]:
    """Ray Serve with the application; the end of the block drains and ends all of it.

    Yields:
        what is wrong with the application (None: nothing), and whether somebody ends it.
    """
    from components.pipeline.cluster import ray_session

    for name, value in SERVE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray puts handlers of its own in the place of ours while it starts.
    with ray_session(num_cpus=max(cores(), options.replicas)), _ended_by_signals() as ending:
        serve = _ray_serve()
        try:
            _start(serve, deployed, options, port)
            yield lambda: _problem(serve), ending
        finally:
            try:
                _drain(Path(deployed.end_mark))
            finally:
                _shut_down(serve)


def _ray_serve() -> Any:
    try:
        from ray import serve
    except ImportError as error:
        raise UsageError(
            f"Ray Serve is not installed: {error}", where="ray[serve]", remedy="make setup"
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    return serve


def _start(serve: Any, deployed: Deployed, options: ServeOptions, port: int) -> None:
    from ray.exceptions import RayError

    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": options.host, "port": port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run(_application(deployed, options.replicas), name=APPLICATION, route_prefix="/")
    except (RayError, RuntimeError, TimeoutError, ValueError) as error:
        raise StorageError(
            f"Ray Serve does not start: {error}",
            where=f"--host {options.host} --port {port}",
            remedy="if somebody else took the port in the meantime, give another: --port 0",
        ) from None


def _problem(serve: Any) -> str | None:
    """What is wrong with the application; None: nothing."""
    from ray.serve.schema import ApplicationStatus

    status = serve.status().applications.get(APPLICATION)
    broken = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
    if status is None or status.status in broken:
        return str(status.message if status else "it is gone")
    return None


def _drain(end: Path) -> None:
    """Say that the service ends, and wait until every replica has answered what it took in."""
    from components.serving.engine import DRAINS_WITHIN_S, answering

    end.touch()
    until = time.monotonic() + DRAINS_WITHIN_S
    while answering(end) and time.monotonic() < until:
        time.sleep(POLL_S)


def _shut_down(serve: Any) -> None:
    """End Ray Serve; after our own end, for its proxy says 404 to all who still call."""
    from ray.exceptions import RayError

    try:
        serve.shutdown()
    except (RayError, RuntimeError, TimeoutError) as error:
        print(f"  Ray Serve did not end in order: {error}", file=sys.stderr)


def _application(deployed: Deployed, replicas: int) -> Any:
    from ray import serve

    def build() -> Any:
        from components.serving.app import build_app
        from components.serving.engine import begun_mark

        begun = begun_mark(Path(deployed.end_mark)).exists()
        return build_app(deployed, among_others=replicas > 1 and begun)

    # Ours is the queue: that of Serve would answer without a Retry-After, and so would callers who
    # send slowly fill it for the others.
    return serve.deployment(
        name="recommender",
        num_replicas=replicas,
        max_ongoing_requests=OPEN_CALLS,
        health_check_period_s=HEALTH_CHECK_S,
        graceful_shutdown_wait_loop_s=POLL_S,
        graceful_shutdown_timeout_s=ENDS_WITHIN_S,
        # The one that Ray gives it is the only one that the replica sees.
        ray_actor_options={"num_gpus": int(deployed.device == "cuda")},
    )(serve.ingress(build)()).bind()


def _wait_until_ready(
    address: str,
    end: Path,
    replicas: int,
    ending: threading.Event,
    problem: Callable[[], str | None],
) -> None:
    """Return when every replica answers, or somebody ends the service.

    Raises:
        StageError: a replica cannot load the model.
        StorageError: it takes too long, or Ray Serve gave up.
    """
    from components.serving.engine import answering

    until = time.monotonic() + READY_WITHIN_S
    while not ending.wait(POLL_S):
        status, said = _readiness(address)
        if status == 200 and answering(end) >= replicas:
            return
        if said.get("status") == "failed":
            raise StageError(f"the model cannot be served: {said.get('error')}")
        if (why := problem()) or time.monotonic() > until:
            some = answering(end)
            too_few = 0 < some < replicas
            raise StorageError(
                "it does not become ready: "
                + (why or (f"{some} of {replicas} replicas answer" if too_few else "no answer")),
                where=address,
                remedy=("take fewer replicas (--replicas), or " if too_few else "")
                + "reelflow doctor looks for the usual causes",
            )


def _readiness(address: str) -> tuple[int, dict[str, Any]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/readyz", timeout=5) as answer:
            return int(answer.status), dict(json.load(answer))
    except urllib.error.HTTPError as error:
        try:
            return error.code, dict(json.load(error))
        except ValueError:
            return error.code, {}
    except (OSError, http.client.HTTPException, ValueError):
        return 0, {}


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@contextmanager
def _ended_by_signals() -> Iterator[threading.Event]:
    """SIGTERM and Ctrl-C set the event; a second one changes nothing: ending takes seconds."""
    ending = threading.Event()

    def end(*_: object) -> None:
        ending.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
