"""What gc frees, and above all what it must never touch."""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import boto3
import pytest
from published import age, publish, settings_in
from real_services import NewDatabase
from s3_service import s3_service

from components.pipeline import gc
from components.pipeline.artifacts import Input
from components.pipeline.errors import ParamsError
from components.pipeline.manifest import Manifest, Store
from components.pipeline.presence import sweeping
from components.pipeline.references import MODEL_DIGEST, refer, registry_identity
from components.pipeline.runner import open_store
from components.pipeline.settings import Settings
from components.pipeline.tracking import connect


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def store(settings: Settings) -> Store:
    return open_store(settings)


@pytest.fixture
def bucket() -> Iterator[str]:
    with s3_service():
        boto3.client("s3").create_bucket(Bucket="artifacts")
        yield "s3://artifacts/run"


def keys(store: Store) -> set[str]:
    return {manifest.key for manifest in store.manifests()}


def attempts(store: Store) -> set[str]:
    return {"/".join(name.split("/")[:3]) for name in store.folder.names("data")}


def sweep(settings: Settings, older_than: str = "7d") -> str:
    return "\n".join(gc.collect(settings, older_than, delete=True))


def digest(manifest: Manifest) -> dict[str, str]:
    return {manifest.stage: manifest.output_digest(manifest.stage)}


def chain(store: Store, key: str, days_old: float) -> list[Manifest]:
    """ingest → split → train, all of one age."""
    ingest = publish(store, "ingest", f"ingest-{key}", days_old=days_old)
    split = publish(store, "split", f"split-{key}", days_old=days_old, inputs=digest(ingest))
    train = publish(store, "train", f"train-{key}", days_old=days_old, inputs=digest(split))
    return [ingest, split, train]


def test_nothing_is_removed_without_being_told(settings: Settings, store: Store) -> None:
    chain(store, "old", 30)
    chain(store, "new", 20)
    before = keys(store), attempts(store)
    said = "\n".join(gc.collect(settings, "7d", delete=False))
    assert (keys(store), attempts(store)) == before
    assert "ingest-old" in said
    assert "would be freed; --yes does it" in said


def test_an_old_chain_goes_and_the_newest_of_each_stage_stays(
    settings: Settings, store: Store
) -> None:
    chain(store, "old", 30)
    new = chain(store, "new", 20)
    sweep(settings)
    assert keys(store) == {"ingest-new", "split-new", "train-new"}
    assert len(attempts(store)) == 3
    # What is kept can still be read, digests and all.
    assert Path(Input(store, "train", new[2]).path("data.txt")).read_text() == "train-new"


def test_what_a_kept_result_was_made_from_stays_however_old(
    settings: Settings, store: Store
) -> None:
    chain(store, "old", 30)
    publish(store, "ingest", "ingest-newer", days_old=25)
    publish(store, "split", "split-newer", days_old=25)
    # `train-old` is the newest of its stage: through two digests it needs `ingest-old`.
    sweep(settings)
    assert keys(store) == {"ingest-old", "split-old", "train-old", "ingest-newer", "split-newer"}


def test_of_equal_outputs_the_one_that_was_read_stays(settings: Settings, store: Store) -> None:
    publish(store, "ingest", "first", content="same", days_old=40)
    second = publish(store, "ingest", "second", content="same", days_old=30)
    publish(store, "ingest", "third", content="same", days_old=20)
    publish(store, "split", "reader", days_old=25, inputs=digest(second))
    publish(store, "ingest", "newest", days_old=15)
    sweep(settings)
    assert keys(store) == {"second", "reader", "newest"}


def test_young_results_stay(settings: Settings, store: Store) -> None:
    chain(store, "a", 3)
    chain(store, "b", 2)
    sweep(settings)
    assert len(keys(store)) == 6
    sweep(settings, "1d")
    assert len(keys(store)) == 3


def test_a_manifest_goes_before_its_files(
    settings: Settings, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(store, "old", 30)
    chain(store, "new", 20)

    def killed(self: object, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("components.pipeline.storage.Folder.delete_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        sweep(settings)
    # Killed between the two: every manifest that is left names files that are there.
    assert len(keys(store)) == 5
    for manifest in store.manifests():
        Input(store, manifest.stage, manifest).path()
    monkeypatch.undo()
    sweep(settings)
    assert len(attempts(store)) == 3


def test_files_that_no_manifest_names_go_after_an_hour(settings: Settings, store: Store) -> None:
    chain(store, "new", 0)
    for name, days in (("dead", 0.1), ("writing", 0.01)):
        folder = Path(store.folder.path(f"data/split/{name}"))
        folder.mkdir()
        (folder / "part.bin").write_bytes(bytes(2048))
        age(folder, days)
    said = sweep(settings)
    assert "data/split/dead" in said
    assert "2.0 KiB freed" in said
    left = {name for name in attempts(store) if not name.endswith(("dead", "writing"))}
    assert len(left) == 3
    assert Path(store.folder.path("data/split/writing/part.bin")).exists()
    assert not Path(store.folder.path("data/split/dead")).exists()


def test_while_a_stage_runs_its_files_and_all_results_are_left_alone(
    settings: Settings, store: Store
) -> None:
    chain(store, "old", 30)
    chain(store, "new", 20)
    # The folder of a training that has been running for a day and has written nothing yet.
    folder = Path(store.folder.path("data/train/running"))
    folder.mkdir()
    age(folder, 1)
    scratch = settings.scratch / "train" / "key1"
    scratch.mkdir(parents=True)
    age(scratch, 30)
    lock = settings.home / "locks" / "train-key1"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = sweep(settings)
        assert folder.exists()
        assert scratch.exists()
        assert len(keys(store)) == 6
        assert "train is running" in said
    sweep(settings)
    assert not folder.exists()
    assert not scratch.exists()
    assert len(keys(store)) == 3


def test_a_store_that_others_may_write_keeps_unnamed_files_for_a_day(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, store=str(tmp_path / "shared"))
    store = open_store(settings)
    for name, days in (("hours", 0.5), ("days", 2)):
        folder = Path(store.folder.path(f"data/split/{name}"))
        folder.mkdir(parents=True)
        (folder / "part.bin").write_bytes(b"x")
        age(folder, days)
    sweep(settings)
    assert attempts(store) == {"data/split/hours"}


def test_an_unreadable_manifest_protects_its_stage_and_all_results(
    settings: Settings, store: Store
) -> None:
    chain(store, "old", 30)
    chain(store, "new", 20)
    # A manifest of a later version of the program: what it names and needs is not known here.
    later = b'{"format": 99, "digest": "", "body": {}}'
    store.folder.put("manifests/train/later.json", later, replace=False)
    folder = Path(store.folder.path("data/train/of-later"))
    folder.mkdir()
    age(folder, 9)
    said = sweep(settings)
    assert "a manifest of train is not readable" in said
    assert folder.exists()
    assert len(keys(store)) == 6


def test_scratch_and_fetched_copies_go_when_they_are_old(settings: Settings) -> None:
    for days, name in ((30, "old"), (1, "young")):
        for folder in (settings.scratch / "train" / name, settings.fetched / name):
            folder.mkdir(parents=True)
            (folder / "file.bin").write_bytes(bytes(1024))
            age(folder, days)
    # One new file in an old folder: somebody came back to it.
    resumed = settings.scratch / "train" / "resumed"
    (resumed / "work").mkdir(parents=True)
    age(resumed, 30)
    (resumed / "work" / "checkpoint").write_bytes(b"x")
    assert "2.0 KiB freed" in sweep(settings)
    assert sorted(p.name for p in (settings.scratch / "train").iterdir()) == ["resumed", "young"]
    assert [p.name for p in settings.fetched.iterdir()] == ["young"]


@pytest.mark.slow
def test_what_a_registered_model_was_made_from_stays(settings: Settings, store: Store) -> None:
    from mlflow import MlflowClient

    by_digest, by_key = chain(store, "by-digest", 30), chain(store, "by-its-key", 28)
    chain(store, "nobody-asks", 26)
    chain(store, "newest", 20)
    client = MlflowClient(settings.tracking)
    client.create_registered_model("recommender")
    for tags in (
        {"recommender_digest": by_digest[2].output_digest("train"), "note": "first"},
        {"manifest_key": by_key[2].key},
    ):
        client.create_model_version("recommender", source=str(settings.home), tags=tags)
    sweep(settings)
    stays = ("by-digest", "by-its-key", "newest")
    assert keys(store) == {f"{s}-{key}" for s in ("ingest", "split", "train") for key in stays}


@pytest.mark.slow
def test_what_the_registry_of_another_home_needs_stays_until_its_version_is_gone(
    bucket: str, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    for place in (str(tmp_path / "shared"), f"{bucket}-referenced"):
        # One registry for both stores; no other home can ask it.
        theirs = settings_in(tmp_path / "theirs", store=place)
        store = open_store(theirs)
        registered = chain(store, "registered", 30)
        chain(store, "nobody-asks", 28)
        chain(store, "newest", 20)
        connect(theirs)
        client = MlflowClient(theirs.tracking)
        identity = registry_identity(theirs, client)
        needs = [registered[2].key]
        refer(store, identity, "recommender", "0123456789abcdef", needs)
        if not place.startswith(bucket):
            client.create_registered_model("recommender")
        tags = {MODEL_DIGEST: "0123456789abcdef"}
        version = client.create_model_version("recommender", str(tmp_path), tags=tags)

        mine = settings_in(tmp_path / "mine", store=place)
        there = {f"{s}-{k}" for s in ("ingest", "split", "train") for k in ("registered", "newest")}
        sweep(mine, "0h")
        assert keys(store) == there
        sweep(theirs, "0h")
        assert keys(store) == there
        client.delete_model_version("recommender", version.version)
        assert "results are left alone" not in sweep(mine, "0h")
        assert keys(store) == there
        assert "reference    recommender, whose version is gone" in sweep(theirs, "0h")
        assert store.folder.names("references") == []
        assert keys(store) == {"ingest-newest", "split-newest", "train-newest"}


def test_a_reference_that_cannot_be_read_protects_all_results(
    settings: Settings, store: Store
) -> None:
    chain(store, "old", 30)
    chain(store, "new", 20)
    for data in (b'{"format": 99}', b"", b"[]"):
        store.folder.put("references/later/model-1.json", data, replace=True)
        said = sweep(settings)
        assert "references/later/model-1.json: what a registered model needs" in said
        assert "remedy: " in said
        assert len(keys(store)) == 6


def test_runs_see_a_gc_of_a_home_that_was_not_there(tmp_path: Path) -> None:
    store = open_store(settings_in(tmp_path, store=str(tmp_path / "shared")))
    chain(store, "new", 20)
    fresh = settings_in(tmp_path / "fresh", store=store.uri)
    with sweeping(fresh, store, hold=True):
        assert [name for name in store.folder.names("leases") if "/sweeps-" in name]
    assert store.folder.names("leases") == []


def test_results_are_left_alone_when_the_registry_cannot_be_asked(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, tracking="http://127.0.0.1:9")
    store = open_store(settings)
    chain(store, "old", 30)
    chain(store, "new", 20)
    said = sweep(settings)
    assert "the model registry cannot be asked" in said
    assert len(keys(store)) == 6


def test_results_are_left_alone_when_the_registry_is_harmed(
    settings: Settings, store: Store, new_database: NewDatabase
) -> None:
    settings.home.mkdir(exist_ok=True)
    shutil.copy(new_database.file, settings.home / "mlflow.db")
    with closing(sqlite3.connect(settings.home / "mlflow.db")) as database:
        database.execute("DROP TABLE model_version_tags")
        database.commit()
    chain(store, "old", 30)
    chain(store, "new", 20)
    said = sweep(settings)
    assert "results are left alone: MLFLOW_TRACKING_URI: the model registry cannot be" in said
    assert len(keys(store)) == 6


@pytest.mark.parametrize("text", ["", "7", "d", "7 days", "-1d", "1y", "1e3h"])
def test_an_age_that_cannot_be_read_is_refused(text: str, settings: Settings) -> None:
    with pytest.raises(ParamsError, match="12h, 7d, 4w"):
        list(gc.collect(settings, text, delete=True))


def test_ages_are_read() -> None:
    assert [gc.parse_age(t) for t in ("12h", "7d", "4w", "0.5d")] == [
        12 * 3600,
        7 * 86400,
        28 * 86400,
        43200,
    ]


def test_an_empty_or_absent_store_is_fine(settings: Settings) -> None:
    assert sweep(settings) == "0 B freed"
    assert not settings.home.exists()


def test_an_object_store_is_freed_alike(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path, store=bucket)
    store = open_store(settings)
    chain(store, "old", 30)
    new = chain(store, "new", 20)
    store.folder.put("data/train/dead/part.bin", bytes(4096), replace=False)
    store.folder.put("scratch/train/key1/checkpoints/onerec/state", bytes(2048), replace=False)
    said = sweep(settings, "4w")
    assert "data/train/dead" not in said
    assert "train/key1" not in said
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket="artifacts", Key="run/data/train/dead/big")
    assert keys(store) == {"ingest-new", "split-new", "train-new"}
    # Object times cannot be set; so the time that must pass is taken away instead.
    monkeypatch.setattr(gc, "GRACE_ELSEWHERE_S", -60.0)
    freed = sweep(settings, "0h")
    assert "6.0 KiB freed" in freed
    assert "upload of data/train/dead/big" in freed
    assert len(attempts(store)) == 3
    assert store.folder.files("scratch") == []
    assert "Uploads" not in client.list_multipart_uploads(Bucket="artifacts")
    assert Path(Input(store, "train", new[2]).path("data.txt")).read_text() == "train-new"


def test_logs_of_our_own_dead_clusters_go(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from components.pipeline import ray_sessions

    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    # A process that names its session, as Ray's daemons do. It has begun once it says so: before,
    # the kernel may not have its arguments yet.
    naming = "import time; print(flush=True); time.sleep(60)"
    alive = subprocess.Popen(
        [sys.executable, "-c", naming, "session_alive"], stdout=subprocess.PIPE
    )
    assert alive.stdout is not None
    alive.stdout.readline()
    homes = {"dead": settings.home, "alive": settings.home, "young": settings.home}
    homes |= {"other": tmp_path / "other home", "unmarked": None}
    for name, home in homes.items():
        session = tmp_path / "ray" / f"session_{name}"
        (session / "logs").mkdir(parents=True)
        (session / "logs" / "raylet.out").write_bytes(bytes(1024))
        if home is not None:
            monkeypatch.setenv(ray_sessions.OWNER, str(home))
            ray_sessions.mark(str(session))
        age(session, 0.5 if name == "young" else 30)
    try:
        assert "session_dead" in sweep(settings)
    finally:
        alive.kill()
        alive.wait()
    left = {folder.name for folder in (tmp_path / "ray").iterdir()}
    assert left == {"session_alive", "session_young", "session_other", "session_unmarked"}
