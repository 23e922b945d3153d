"""Freeing disk beside runs

gc in a loop beside a running flow takes nothing from it; runs of other machines on the same store
are seen by their leases; a gc that is killed leaves a whole store.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from command_line import REELFLOW, ROOT, environment, reelflow, settings
from fault_suite import LONG, Record
from faulty_s3 import FaultyS3
from published import age, publish, settings_in
from s3_service import s3_service
from smallest_run import SMALL

from components.pipeline import gc, presence, s3
from components.pipeline.artifacts import Input
from components.pipeline.manifest import Store
from components.pipeline.presence import announced, sweeping
from components.pipeline.runner import open_store
from components.pipeline.settings import Settings

KILLS = 60 if LONG else 4


def sweep(settings: Settings, older_than: str = "0h") -> str:
    return "\n".join(gc.collect(settings, older_than, delete=True))


def chains(store: Store, count: int) -> None:
    """ingest → split, ``count`` times, each an hour older than the last."""
    for number in range(count):
        days = 1 + number / 24
        raw = publish(store, "ingest", f"ingest-{number}", days_old=days)
        inputs = {"ingest": raw.output_digest("ingest")}
        publish(store, "split", f"split-{number}", days_old=days, inputs=inputs)


def assert_whole(store: Store) -> int:
    """Every manifest names files that are there and match; how many there are."""
    found = store.manifests()
    for manifest in found:
        for name in manifest.body["outputs"]:
            Input(store, name, manifest).path()
    return len(found)


@pytest.mark.slow
def test_gc_in_a_loop_beside_a_flow_takes_nothing_from_it(tmp_path: Path, record: Record) -> None:
    home = tmp_path / "home"
    chosen = [*SMALL, *settings(validate__great_expectations="false")]
    flow = ["run", "recommend", *chosen, "--until", "train_recommender" if LONG else "split"]
    mine = Settings(home, str(home / "store"), f"sqlite:///{home / 'mlflow.db'}", None, None)
    store = open_store(mine)
    # What the flow takes from the store is not the newest of its stage: gc would free it.
    assert reelflow(home, "stage", "ingest", *chosen).returncode == 0
    (first,) = store.manifests("ingest")
    other = settings(ingest__simulator__interactions=5000)
    assert reelflow(home, "stage", "ingest", *chosen, *other).returncode == 0
    assert f"ingest {first.key}" in "\n".join(gc.collect(mine, "0h", delete=False))
    run = subprocess.Popen(
        [*REELFLOW, *flow], env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    lock = home / "locks" / "runs"
    while not list(lock.glob("recommend.*")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    sweeps = 0
    while run.poll() is None:
        said = sweep(mine)
        sweeps += 1
        if "left alone: recommend is running" not in said:
            break
        time.sleep(0.05)
    said, error = run.communicate()
    assert run.returncode == 0, error
    assert b"Traceback" not in error
    assert re.search(rb"ingest +cached", said)
    assert sweeps > 3
    # Now newer results need it.
    sweep(mine)
    assert first.key in {m.key for m in store.manifests("ingest")}
    assert_whole(store)
    record("gc --older-than 0h in a loop beside a flow", "flow completed")


def test_without_an_announcement_the_same_results_would_be_gone(tmp_path: Path) -> None:
    mine = settings_in(tmp_path)
    store = open_store(mine)
    chains(store, 2)
    with announced(mine, store, "recommend"):
        assert "recommend is running" in sweep(mine)
        assert assert_whole(store) == 4
    sweep(mine)
    assert assert_whole(store) == 2


def test_scratch_of_a_flow_between_two_stages_stays(tmp_path: Path) -> None:
    mine = settings_in(tmp_path)
    scratch = mine.scratch / "train_recommender" / "key" / "work"
    scratch.mkdir(parents=True)
    (scratch / "checkpoint").write_text("half")
    age(mine.scratch, 30)
    with announced(mine, open_store(mine), "recommend"):
        sweep(mine)
        assert (scratch / "checkpoint").exists()
    sweep(mine)
    assert not scratch.exists()


def elsewhere(tmp_path: Path, store: str) -> Settings:
    """Another home, as of another machine, on the same store."""
    return settings_in(tmp_path / "elsewhere", store=store)


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_run_of_another_home_is_seen_by_its_lease(
    kind: str, tmp_path: Path, record: Record
) -> None:
    with s3_service():
        import boto3

        boto3.client("s3").create_bucket(Bucket="shared")
        uri = "s3://shared/store" if kind == "s3" else str(tmp_path / "shared")
        mine, other = settings_in(tmp_path, store=uri), elsewhere(tmp_path, uri)
        mine.home.mkdir()
        store = open_store(mine)
        chains(store, 2)
        with announced(other, open_store(other), "recommend"):
            assert "recommend is running" in sweep(mine)
            assert len(store.manifests()) == 4
        assert store.folder.names("leases") == []
        sweep(mine)
        assert len(store.manifests()) == 2
        assert store.folder.names("leases") == []
    record(f"gc of a store ({kind}) that another home uses", "left alone, then freed")


def test_a_run_that_was_killed_counts_until_its_lease_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    uri = str(tmp_path / "shared")
    mine = settings_in(tmp_path, store=uri)
    mine.home.mkdir()
    store = open_store(mine)
    chains(store, 2)
    # On another machine: this one cannot look at its lock.
    body = {"what": "recommend", "host": "gpu-7", "lock": "/home/x", "running_s": 60.0}
    store.folder.put("leases/runs-1.json", json.dumps(body).encode(), replace=True)
    assert "recommend on gpu-7 is running" in sweep(mine)
    assert len(store.manifests()) == 4
    monkeypatch.setattr(presence, "EXPIRES_S", 0.2)
    time.sleep(0.3)
    sweep(mine)
    assert len(store.manifests()) == 2
    assert store.folder.names("leases") == []
    record("run of another machine killed", "left alone until its lease expires")


HOLDS = """
import sys, time
from pathlib import Path
from components.pipeline.presence import announced
from components.pipeline.runner import open_store
from components.pipeline.settings import Settings
mine = Settings(Path(sys.argv[1]), sys.argv[2], "", None, None)
with announced(mine, open_store(mine), "recommend"):
    Path(sys.argv[3]).touch()
    time.sleep(600)
"""


def test_a_run_of_this_machine_that_was_killed_counts_no_more(
    tmp_path: Path, record: Record
) -> None:
    mine = settings_in(tmp_path)
    chains(open_store(mine), 2)
    ready = tmp_path / "ready"
    words = [str(mine.home), mine.store, str(ready)]
    run = subprocess.Popen([sys.executable, "-c", HOLDS, *words], cwd=ROOT)
    while not ready.exists():
        assert run.poll() is None
        time.sleep(0.05)
    assert "recommend is running" in sweep(mine)
    run.kill()
    run.wait()
    sweep(mine)
    assert assert_whole(open_store(mine)) == 2
    assert not [p for p in (mine.home / "locks").rglob("*") if p.is_file()]
    record("run of this machine killed", "freed at once")


def test_a_lease_is_refreshed_while_its_holder_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "REFRESH_S", 0.05)
    monkeypatch.setattr(presence, "EXPIRES_S", 0.4)
    uri = str(tmp_path / "shared")
    mine, other = settings_in(tmp_path, store=uri), elsewhere(tmp_path, uri)
    mine.home.mkdir()
    with announced(other, open_store(other), "recommend"):
        time.sleep(1)
        with sweeping(mine, open_store(mine), hold=True) as found:
            assert [str(use) for use in found.all] == ["recommend"]
            assert found.here == []


def test_a_run_waits_for_a_gc_at_work(tmp_path: Path, record: Record) -> None:
    mine = settings_in(tmp_path)
    mine.home.mkdir()
    store = open_store(mine)
    began = threading.Event()

    def run() -> None:
        with announced(mine, store, "recommend"):
            began.set()

    with sweeping(mine, store, hold=True) as found:
        assert found.all == []
        thread = threading.Thread(target=run)
        thread.start()
        assert not began.wait(1)
    assert began.wait(5)
    thread.join()
    record("run that starts beside gc", "waits for it")


def test_a_stage_of_dvc_that_waits_for_a_gc_brings_its_inputs_back_after_it(
    tmp_path: Path,
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    quick = settings(validate__great_expectations="false")
    for name in ("ingest", "validate"):
        done = reelflow(home, "stage", name, *SMALL, *quick, "--export", str(out / name))
        assert done.returncode == 0, done.stderr
    mine = settings_in(tmp_path)
    store = open_store(mine)
    said = tmp_path / "said"
    with sweeping(mine, store, hold=True), said.open("w") as file:
        words = ["stage", "split", *SMALL, *quick, "--export", str(out / "split")]
        stage = subprocess.Popen(
            [*REELFLOW, *words], cwd=ROOT, env=environment(home), stdout=file, stderr=file
        )
        deadline = time.monotonic() + 60
        while "waiting for it" not in said.read_text():
            assert stage.poll() is None, said.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for manifest in store.manifests():
            store.folder.delete(f"manifests/{manifest.stage}/{manifest.key}.json")
            store.folder.delete_folder(f"data/{manifest.stage}")
    assert stage.wait(60) == 0, said.read_text()
    assert {manifest.stage for manifest in store.manifests()} == {"ingest", "validate", "split"}
    assert_whole(store)


def test_a_gc_that_lost_sight_of_its_store_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.pipeline.errors import StorageError

    mine = settings_in(tmp_path)
    store = open_store(mine)
    chains(store, 2)
    monkeypatch.setattr(presence, "EXPIRES_S", 0.0)
    with pytest.raises(StorageError, match="did not answer for a while"):
        sweep(mine)
    assert assert_whole(store) == 4


def test_files_of_a_long_run_elsewhere_stay_however_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "shared")
    mine = settings_in(tmp_path, store=uri)
    mine.home.mkdir()
    store = open_store(mine)
    for name, days in (("its", 2), ("older", 4)):
        folder = Path(store.folder.path(f"data/train/{name}"))
        folder.mkdir(parents=True)
        (folder / "part").write_text("x")
        age(folder, days)
    # It has been running for three days.
    body = {"what": "train", "host": "gpu-7", "lock": "/x", "running_s": 3 * 86400.0}
    store.folder.put("leases/runs-1.json", json.dumps(body).encode(), replace=True)
    sweep(mine)
    assert {n.split("/")[2] for n in store.folder.names("data")} == {"its"}


def test_a_gc_that_is_killed_leaves_a_whole_store(tmp_path: Path, record: Record) -> None:
    mine = settings_in(tmp_path)
    store = open_store(mine)
    instants = random.Random(0)
    partial = 0
    for _ in range(KILLS):
        chains(store, 15)
        child = os.fork()
        if not child:
            try:
                for number, _ in enumerate(gc.collect(mine, "0h", delete=True)):
                    if number == 0:
                        (tmp_path / "begun").touch()
            finally:
                os._exit(0)
        while not (tmp_path / "begun").exists():
            time.sleep(0.001)
        time.sleep(instants.random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        (tmp_path / "begun").unlink()
        left = assert_whole(store)
        partial += 2 < left < 30
        sweep(mine)
        assert assert_whole(store) == 2
        for folder in Path(store.folder.path("data")).iterdir():
            age(folder, 1)
        sweep(mine)
        assert len({n.split("/")[2] for n in store.folder.names("data")}) == 2
        for manifest in store.manifests():
            store.folder.delete(f"manifests/{manifest.stage}/{manifest.key}.json")
            store.folder.delete_folder(f"data/{manifest.stage}")
    assert partial
    record("gc killed in the middle", "store whole, the next gc goes on", KILLS)


def test_a_run_that_ends_because_the_store_is_away_does_not_wait_for_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presence, "REFRESH_S", 0.2)
    monkeypatch.setattr(s3, "PATIENCE_S", 20.0)
    with FaultyS3(tmp_path) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        mine = settings_in(tmp_path, store=server.make_bucket("shared") + "/store")
        mine.home.mkdir()
        with announced(mine, open_store(mine), "recommend"):
            server.kill()
            # A refresh is under way that nobody answers.
            time.sleep(1)
            left = time.monotonic()
        assert time.monotonic() - left < 10
