"""Limits of the machine

A full disk, folders that may only be read, ports in use, little shared memory, no home folder, no
rights, odd paths, other time zones and locales, no git, no network: the command says what is
wrong, where and what to do, or it works and gives the same bits.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    REELFLOW,
    environment,
    processes_of,
    reelflow,
    settings,
    wait_until_nothing_runs_in,
)
from confined import (
    NOBODY,
    Done,
    as_nobody,
    path_without,
    q,
    reachable_interpreter,
    run_script,
)
from fault_suite import LONG, Record
from smallest_run import SMALL

from components.pipeline.artifacts import Input
from components.pipeline.manifest import Store

QUICK = [
    *SMALL,
    *settings(
        validate__great_expectations="false",
        train_recommender__max_steps=20,
        train_recommender__evaluate_every=10,
    ),
]
INGEST = ["stage", "ingest", *QUICK]
RUN = ["run", "recommend", *QUICK]
ROOM = "200m"


def plain(home: Path, *words: str, **more: str) -> dict[str, Any]:
    done = reelflow(home, *words, **more)
    assert done.returncode == 0, done.stderr
    return digests(home / "store")


def digests(store: Path) -> dict[str, dict[str, str]]:
    """Stage → artifact → digest of its files, each of which is read and checked."""
    opened = Store(str(store), store.parent / "fetched")
    found: dict[str, dict[str, str]] = {}
    for manifest in opened.manifests():
        for name in manifest.body["outputs"]:
            Input(opened, name, manifest).path()
            found.setdefault(manifest.stage, {})[name] = manifest.output_digest(name)
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of an undisturbed run: what all others must equal, and databases to start with."""
    home = tmp_path_factory.mktemp("plain") / "home"
    plain(home, *RUN, *([] if LONG else ["--until", "split"]))
    return home


@pytest.fixture(scope="module")
def databases(first: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with databases and nothing else: making them takes longer than most tests here."""
    home = tmp_path_factory.mktemp("databases") / "home"
    shutil.copytree(first, home, ignore=shutil.ignore_patterns("store", "scratch", "mlflow-*"))
    return home


def assert_same(store: Path, first: Path, stages: int) -> None:
    """The same bits, of at least so many stages.

    The record of evaluation, registration and report holds names of runs, versions and times.
    """
    ours, theirs = digests(store), digests(first / "store")
    own = {"register", "report"}
    shared = (ours.keys() & theirs.keys()) - own
    assert len(shared) >= stages
    assert {stage: ours[stage] for stage in shared} == {stage: theirs[stage] for stage in shared}


def assert_refused(done: Done, what: str, *places: object) -> None:
    assert done.code == 4, (done.out, done.err)
    message = done.err[done.err.index("error: ") :]
    assert message.count("error: ") == 1
    assert what in message
    assert any(str(place) in message.splitlines()[0] for place in places), message
    assert "remedy: " in message


def full_disk(
    tmp_path: Path,
    command: list[str],
    size: str,
    *,
    prepare: str = "",
    **more: str,
) -> tuple[Done, Done, Path, Path]:
    """Run ``command`` with its home on a disk of ``size``, and again once there is room.

    Returns:
        How both ended; copies of the disk after the first and after the second.
    """
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    script = f"""
mount -t tmpfs -o size={size} tmpfs {q(disk)}
{prepare.format(disk=q(disk))}
run {" ".join(map(q, [*REELFLOW, *command]))}
cp -r {q(disk)} {q(tmp_path / "after")}
mount -o remount,size={ROOM} {q(disk)}
run {" ".join(map(q, [*REELFLOW, *command]))}
cp -r {q(disk)} {q(tmp_path / "healed")}
"""
    more = {"REELFLOW_HOME": str(disk / "home"), **more}
    refused, healed = run_script(script, out, {**environment(disk), **more}, ("mount",), 2)
    return refused, healed, tmp_path / "after", tmp_path / "healed"


FULL = ("the disk is full", "database or disk is full", "No space left on device")


def test_a_disk_that_is_full_in_the_middle_of_a_stage(
    databases: Path, first: Path, tmp_path: Path, record: Record
) -> None:
    size = sum(f.stat().st_size for f in databases.rglob("*") if f.is_file()) // 1024 + 120
    prepare = f"cp -r {q(databases)} {{disk}}/home"
    refused, healed, after, final = full_disk(tmp_path, INGEST, f"{size}k", prepare=prepare)
    assert_refused(refused, "the disk is full", tmp_path / "disk")
    assert "reelflow gc" in refused.err
    assert digests(after / "home" / "store") == {}
    assert healed.code == 0, healed.err
    assert_same(final / "home" / "store", first, 1)
    record("disk full in the middle of a stage", "refused with place and remedy, then completed")


def test_a_store_whose_disk_is_full(
    databases: Path, first: Path, tmp_path: Path, record: Record
) -> None:
    home = tmp_path / "home"
    shutil.copytree(databases, home)
    refused, healed, after, final = full_disk(
        tmp_path,
        [*INGEST, "--store", str(tmp_path / "disk" / "store")],
        "60k",
        REELFLOW_HOME=str(home),
    )
    assert_refused(refused, "the disk is full", tmp_path / "disk")
    assert digests(after / "store") == {}
    assert healed.code == 0, healed.err
    assert_same(final / "store", first, 1)
    record("disk of the store full", "refused with place and remedy, then completed")


@pytest.mark.parametrize("kib", (range(100, 1001, 150) if LONG else (600,)))
def test_a_disk_that_is_full_while_mlflow_makes_its_tables(
    kib: int, tmp_path: Path, record: Record
) -> None:
    """Half the tables would never become all of them; so there are none until there are all."""
    refused, healed, after, _ = full_disk(tmp_path, INGEST, f"{kib}k")
    assert_refused(refused, "full", tmp_path / "disk", "sqlite:///")
    assert digests(after / "home" / "store") == {}
    assert healed.code == 0, healed.err
    record("disk full while MLflow makes its tables", "refused, then completed")


@pytest.mark.parametrize("kib", (range(200, 4800, 460) if LONG else (3000,)))
def test_a_disk_that_is_full_while_prefect_makes_its_tables(
    kib: int, tmp_path: Path, record: Record
) -> None:
    command = [*RUN, "--until", "ingest"]
    refused, healed, after, _ = full_disk(tmp_path, command, f"{kib}k")
    assert_refused(refused, "full", tmp_path / "disk")
    # Its last words, without the hundred lines of where in its code they were said.
    assert len(refused.err.splitlines()) < 20
    assert digests(after / "home" / "store") == {}
    assert healed.code == 0, healed.err
    assert processes_of(tmp_path / "disk" / "home") == []
    record("disk full while Prefect makes its tables", "refused, then completed")


@pytest.mark.skipif(not LONG, reason="minutes; part of make faults")
@pytest.mark.parametrize("free_kib", [8, 40, 100, 200, 400, 700, 1000, 1400, 2000])
def test_a_disk_that_is_full_at_any_instant_of_the_flow(
    free_kib: int, databases: Path, first: Path, tmp_path: Path, record: Record
) -> None:
    """Checkpoints of Ray, Prefect's and MLflow's records, results: whoever comes first."""
    size = sum(f.stat().st_size for f in databases.rglob("*") if f.is_file()) // 1024 + free_kib
    prepare = f"cp -r {q(databases)} {{disk}}/home"
    refused, healed, after, final = full_disk(tmp_path, RUN, f"{size}k", prepare=prepare)
    if refused.code:
        assert_refused(refused, "full", tmp_path / "disk", "PREFECT_API_URL", "sqlite:///")
    published = digests(after / "home" / "store")
    assert healed.code == 0, healed.err
    assert_same(final / "home" / "store", first, 8)
    assert published.items() <= digests(final / "home" / "store").items()
    outcome = "refused, then completed" if refused.code else "completed"
    record("disk full somewhere in the flow", outcome)


@pytest.mark.parametrize("what", ["home", "store"])
def test_a_folder_that_may_only_be_read(
    what: str, databases: Path, tmp_path: Path, record: Record
) -> None:
    home, store = tmp_path / "home", tmp_path / "store"
    shutil.copytree(databases, home)
    store.mkdir()
    folder = {"home": home, "store": store}[what]
    command = [*REELFLOW, *INGEST, "--store", str(store)]
    script = f"""
mount --bind {q(folder)} {q(folder)}
mount -o remount,bind,ro {q(folder)}
run {" ".join(map(q, command))}
"""
    (done,) = run_script(script, tmp_path / "out", environment(home), ("mount",), 1)
    assert_refused(done, "ead-only file system", folder)
    record(f"the {what} may only be read", "refused with place and remedy")


RAY = """
from components.pipeline.cluster import ray_session
from components.pipeline.refusals import refusal
from components.pipeline.settings import load_settings
try:
    with ray_session(1):
        print("Ray works")
except Exception as error:
    print(refusal(error, "no cluster", load_settings()))
"""


@pytest.mark.parametrize("remedy", ["RAY_TMPDIR", *(["TMPDIR"] if LONG else [])])
def test_a_temporary_folder_that_may_only_be_read(
    remedy: str, tmp_path: Path, record: Record
) -> None:
    """What the message advises is what helps."""
    # The path of a socket may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        readable, writable = Path(folder) / "r", Path(folder) / "w"
        readable.mkdir()
        writable.mkdir()
        ray = f"{q(sys.executable)} -c {q(RAY)}"
        script = f"""
mount --bind {q(readable)} {q(readable)}
mount -o remount,bind,ro {q(readable)}
run env TMPDIR={q(readable)} {ray}
run env TMPDIR={q(readable)} {remedy}={q(writable)} {ray}
"""
        env = environment(tmp_path / "home")
        env.pop("RAY_TMPDIR", None)
        refused, healed = run_script(script, tmp_path / "out", env, ("mount",), 2)
        assert f"{readable}/ray: no cluster: the disk may only be read" in refused.out
        assert "remedy: give another folder with RAY_TMPDIR (Ray alone) or TMPDIR" in refused.out
        assert healed.out == "Ray works\n", healed
    record("the temporary folder may only be read", "refused with place and remedy, then completed")


def test_a_project_that_may_only_be_read(
    databases: Path, first: Path, tmp_path: Path, record: Record
) -> None:
    home = tmp_path / "home"
    shutil.copytree(databases, home)
    script = f"""
mount --bind . .
mount -o remount,bind,ro .
cd .
run {" ".join(map(q, [*REELFLOW, *INGEST]))}
"""
    (done,) = run_script(script, tmp_path / "out", environment(home), ("mount",), 1)
    assert done.code == 0, done.err
    assert_same(home / "store", first, 1)
    record("the project may only be read", "completed, bitwise equal")


CLOCKS_AND_TONGUES = {
    "time zone and locale C": {
        "TZ": "Asia/Shanghai",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
    },
    "time zone and unknown locale": {"TZ": "America/St_Johns", "LC_ALL": "tr_TR.UTF-8"},
    "locale without UTF-8": {
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "POSIX",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
    },
}


@pytest.mark.parametrize("which", CLOCKS_AND_TONGUES if LONG else ["locale without UTF-8"])
def test_another_time_zone_and_locale(
    which: str, databases: Path, first: Path, tmp_path: Path, record: Record
) -> None:
    # In a folder whose name such a locale cannot write.
    home = tmp_path / "für é ñ" / "home"
    shutil.copytree(databases, home)
    command = RUN if LONG else INGEST
    plain(home, *command, **CLOCKS_AND_TONGUES[which])
    assert_same(home / "store", first, 8 if LONG else 1)
    record(f"{which}, path with a space and é", "completed, bitwise equal")


def test_a_name_that_is_no_utf8_is_one_message(tmp_path: Path, record: Record) -> None:
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    done = subprocess.run(
        [*REELFLOW, "stage", "ingest", "--store", folder],
        env=environment(tmp_path / "home"),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"is not UTF-8" in done.stderr
    assert b"Traceback" not in done.stderr
    record("a path that is not UTF-8", "refused with place and remedy")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user can enter; pytest closes its own to all others."""
    folder = Path(tempfile.mkdtemp(prefix="limits-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def together(folder: Path, databases: Path, which: set[str], *command: str) -> tuple[Done, Path]:
    """Run a command with the limits ``which`` at once; its home is at ``(path)``."""
    home = folder / ("a é b" if "path" in which else "ab") / "home"
    shutil.copytree(databases, home)
    env = environment(home)
    env["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    script = "mount -t tmpfs -o size=64m,mode=1777 tmpfs /dev/shm\n" if "shm" in which else ""
    kinds = ("mount", "net") if "net" in which else ("mount",)
    if "net" in which:
        script += "ip link set lo up\n"
    words = ""
    if "nobody" in which:
        words = as_nobody()
        script += reachable_interpreter(folder / "interpreter")
        for path in (home, *home.rglob("*")):
            shutil.chown(path, NOBODY, NOBODY)
    if "git" in which:
        script += f"export PATH={q(path_without('git', folder / 'programs'))}\n"
    if "home" in which:
        script += "unset HOME\n"
    if "no such home" in which:
        script += "export HOME=/nonexistent\n"
    if "proxy" in which:
        nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
        env |= nowhere | {name.upper(): address for name, address in nowhere.items()}
    if "files" in which:
        script += "ulimit -n 256\n"
    script += f"run {words} {' '.join(map(q, [*REELFLOW, *command]))}\n"
    (done,) = run_script(script, folder / "out", env, kinds, 1)
    return done, home


WHOLE = {
    "64 MB of shared memory": {"shm"},
    "HOME unset": {"home"},
    "HOME=/nonexistent": {"no such home"},
    "another user than root": {"nobody"},
    "path with a space and é": {"path"},
    "no git": {"git"},
    "no network": {"net"},
    "256 open files": {"files"},
    "a proxy that does not answer": {"proxy"},
    "all of these": {"shm", "home", "nobody", "path", "git", "net", "files", "proxy"},
}


@pytest.mark.slow
@pytest.mark.parametrize("which", WHOLE if LONG else ["all of these"])
def test_the_flow_with_training_on_ray(
    which: str, databases: Path, first: Path, open_folder: Path, record: Record
) -> None:
    until = [] if LONG else ["--until", "train_recommender"]
    done, home = together(open_folder, databases, WHOLE[which], *RUN, *until)
    assert done.code == 0, done.err
    assert "git" not in done.err
    assert_same(home / "store", first, 8 if LONG else 3)
    record(which, "completed, bitwise equal")


@pytest.fixture
def taken() -> Iterator[list[int]]:
    """The ports that `ui` takes first, held by someone else."""
    held = []
    for port in (4200, 5000):
        probe = socket.socket()
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            # Somebody has it already, which is all that is wanted.
            probe.close()
            continue
        probe.listen()
        held.append(probe)
    yield [4200, 5000]
    for probe in held:
        probe.close()


@pytest.mark.skipif(not LONG, reason="part of make faults")
def test_ports_in_use(taken: list[int], databases: Path, tmp_path: Path, record: Record) -> None:
    home = tmp_path / "home"
    shutil.copytree(databases, home)
    ui = subprocess.Popen(
        [*REELFLOW, "ui"],
        env=environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = ""
    try:
        assert ui.stdout is not None
        for line in ui.stdout:
            said += line
            if "Ctrl-C" in line:
                break
        ports = [int(word.rpartition(":")[2]) for word in said.split() if "http://" in word]
        assert len(ports) == 2
        assert not set(ports) & set(taken)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/api/health", timeout=10) as page:
            assert json.load(page) is True
    finally:
        ui.send_signal(signal.SIGINT)
        _, error = ui.communicate(timeout=60)
    assert ui.returncode == 0, error
    assert "Traceback" not in error
    wait_until_nothing_runs_in(home)
    record("ports 4200 and 5000 in use", "completed on others")
