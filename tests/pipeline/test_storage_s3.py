"""The artifact store on S3, against a server that speaks the protocol and fails on demand."""

from __future__ import annotations

import json
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from real_services import S3Server
from test_artifacts import script
from tiny_stages import Tiny

from components.pipeline import runner as runner_module
from components.pipeline import s3 as s3_module
from components.pipeline.artifacts import Input, Manifest, Outputs, Store
from components.pipeline.errors import CorruptArtifactError, StorageError, UsageError
from components.pipeline.storage import Folder, open_uri

#: What a test waits for where it is not about how long that takes, and what is added by the
#: requests of the last attempt.
PATIENCE_S, LAST_ATTEMPT_S = 3.0, 15.0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts a request and no patience, where a test is not about how long it takes."""
    monkeypatch.setattr(s3_module, "MAX_ATTEMPTS", 2)
    monkeypatch.setattr(s3_module, "PATIENCE_S", 0.0)


def run_all(tiny: Tiny, folder: Path, store: str) -> tuple[list[str], Any]:
    runner = tiny.runner(folder, store=store)
    executed = [s.name for s in tiny.stages if not runner.execute(s)[1]]
    return executed, runner


def client(s3: S3Server) -> Any:
    import boto3

    return boto3.client("s3", endpoint_url=s3.endpoint)


def objects(s3: S3Server) -> dict[str, bytes]:
    """Everything in the bucket of the test, read by another library."""
    bucket = s3.uri.split("/")[2]
    listed = client(s3).list_objects_v2(Bucket=bucket).get("Contents", [])
    return {
        o["Key"]: client(s3).get_object(Bucket=bucket, Key=o["Key"])["Body"].read() for o in listed
    }


def test_a_run_publishes_to_s3_and_another_machine_reads_it(
    tiny: Tiny, tmp_path: Path, s3: S3Server
) -> None:
    executed, runner = run_all(tiny, tmp_path / "one machine", s3.uri)
    assert executed == ["numbers", "doubled", "total"]
    artifact = Input(runner.store, "total", runner.done["total"])
    assert artifact.read_json() == {"sum": 20.0}
    assert run_all(tiny, tmp_path / "another machine", s3.uri)[0] == []
    assert not [p for p in (tmp_path / "one machine/home/scratch").rglob("*") if p.is_file()]


def test_every_published_file_is_the_object_that_the_manifest_describes(
    tiny: Tiny, tmp_path: Path, s3: S3Server
) -> None:
    import hashlib

    run_all(tiny, tmp_path, s3.uri)
    stored = objects(s3)
    manifests = [
        json.loads(v)["body"]
        for k, v in stored.items()
        if k.endswith(".json") and "/manifests/" in k
    ]
    assert {m["stage"] for m in manifests} == {"numbers", "doubled", "total"}
    for record in (r for m in manifests for r in m["outputs"].values()):
        for file in record["files"]:
            content = stored[f"a store/{record['path']}/{file['name']}"]
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
            assert len(content) == file["size"]


def test_only_the_first_conditional_put_of_a_manifest_wins(s3: S3Server, tmp_path: Path) -> None:
    folder = Folder(s3.uri)
    barrier, won = threading.Barrier(6), []

    def publish(number: int) -> None:
        barrier.wait()
        if folder.put("manifests/s/k.json", str(number).encode(), replace=False):
            won.append(number)

    threads = [threading.Thread(target=publish, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert folder.read("manifests/s/k.json") == str(won[0]).encode()


def test_a_conditional_put_that_met_another_is_tried_again(s3: S3Server) -> None:
    s3.conflicts = 2
    assert Folder(s3.uri).put("manifests/s/k.json", b"mine", replace=False)
    assert Folder(s3.uri).read("manifests/s/k.json") == b"mine"
    s3.conflicts = 100
    with pytest.raises(StorageError, match="another writer was in the way"):
        Folder(s3.uri).put("manifests/s/other.json", b"mine", replace=False)


def test_of_two_publishers_one_wins_both_read_the_same_and_the_loser_leaves_no_file(
    tiny: Tiny, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Machines take turns; this is about two that do not, since one was taken for dead.
    monkeypatch.setattr(runner_module, "lease", lambda *given: nullcontext())
    first, second = (tiny.runner(tmp_path / name, store=s3.uri) for name in ("a", "b"))
    stage = tiny.stages[0]

    def other_machine_is_faster(run: Any) -> None:
        tiny.during = lambda run: None
        first.execute(stage)

    tiny.during = other_machine_is_faster
    manifest, cached = second.execute(stage)
    assert cached is False
    assert manifest.body == first.done["numbers"].body
    assert Input(second.store, "numbers", manifest).read_table().num_rows == 5
    attempts = {key.split("/")[3] for key in objects(s3) if "/data/" in key}
    assert attempts == {manifest.body["outputs"]["numbers"]["path"].split("/")[2]}


def test_a_publication_whose_answer_was_lost_is_still_its_own(
    tiny: Tiny, tmp_path: Path, s3: S3Server
) -> None:
    runner = tiny.runner(tmp_path, store=s3.uri)
    s3.fail_once_after_put = True
    manifest, _ = runner.execute(tiny.stages[0])
    assert s3.fail_once_after_put is False
    assert Input(runner.store, "numbers", manifest).read_table().num_rows == 5


def test_a_stage_killed_while_it_uploads_leaves_nothing_that_is_read(
    tmp_path: Path, s3: S3Server
) -> None:
    s3.slow_down_s = 0.005
    seen = script("killed_runs.py", str(tmp_path), s3.uri, "4")
    assert len(seen) == 4


def test_files_that_a_killed_run_left_behind_are_not_published(
    tiny: Tiny, tmp_path: Path, s3: S3Server
) -> None:
    runner = tiny.runner(tmp_path, store=s3.uri)
    key = runner.identify(tiny.stages[0]).key
    stale = tmp_path / "home/scratch/numbers" / key / "outputs/numbers/of the killed run.parquet"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"PAR1")
    stale.chmod(0o444)
    manifest, _ = runner.execute(tiny.stages[0])
    assert [f["name"] for f in manifest.body["outputs"]["numbers"]["files"]] == ["table.parquet"]


def test_inputs_are_fetched_once_and_checked(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    _, runner = run_all(tiny, tmp_path / "writer", s3.uri)
    manifest = runner.done["numbers"]
    store = Store(s3.uri, tmp_path / "fetched")
    assert Input(store, "numbers", manifest).read_table().num_rows == 5
    s3.requests.clear()
    local = Path(Input(store, "numbers", manifest).path("table.parquet"))
    assert not [r for r in s3.requests if "table.parquet" in r]
    # A local copy that was harmed is fetched again, a harmed object is an error.
    local.unlink()
    local.write_bytes(b"harmed")
    assert Input(store, "numbers", manifest).read_table().num_rows == 5
    bucket, _, key = f"{s3.uri[5:]}/{manifest.body['outputs']['numbers']['path']}".partition("/")
    client(s3).put_object(Bucket=bucket, Key=f"{key}/table.parquet", Body=b"harmed")
    with pytest.raises(CorruptArtifactError, match=r"table\.parquet.*\n.*--force"):
        Input(Store(s3.uri, tmp_path / "fetched again"), "numbers", manifest).read_table()
    client(s3).delete_object(Bucket=bucket, Key=f"{key}/table.parquet")
    with pytest.raises(CorruptArtifactError, match=r"table\.parquet.*\n.*--force"):
        Input(Store(s3.uri, tmp_path / "fetched once more"), "numbers", manifest).read_table()
    assert not list(tmp_path.rglob(".partial/*"))


def test_a_harmed_manifest_is_named_by_its_address(
    tiny: Tiny, tmp_path: Path, s3: S3Server
) -> None:
    _, runner = run_all(tiny, tmp_path, s3.uri)
    name = f"manifests/numbers/{runner.done['numbers'].key}.json"
    runner.store.folder.put(name, b"harmed", replace=True)
    with pytest.raises(CorruptArtifactError) as caught:
        run_all(tiny, tmp_path, s3.uri)
    assert caught.value.where == f"{s3.uri}/{name}"
    assert "reelflow stage numbers --force" in str(caught.value)


def test_an_artifact_without_files_is_an_empty_folder(s3: S3Server, tmp_path: Path) -> None:
    store = Store(s3.uri, tmp_path / "fetched")
    outputs = Outputs(store, "make", ("videos",), tmp_path / "staging")
    manifest = Manifest({"stage": "make", "key": "k", "outputs": outputs.seal()})
    assert list(Path(Input(store, "videos", manifest).path()).iterdir()) == []


@pytest.mark.parametrize("name", ["two words.json", "影片 é/café.json", "a#b?c%20+d.json"])
def test_any_file_name_survives_s3(s3: S3Server, tmp_path: Path, name: str) -> None:
    store = Store(f"{s3.uri}/préfixe #1", tmp_path / "fetched")
    outputs = Outputs(store, "make", ("a",), tmp_path / "staging")
    outputs["a"].write_json({"n": name}, name)
    body = {"stage": "make", "key": "k", "created_at": "now", "outputs": outputs.seal()}
    store.publish(Manifest(body), replace=False)
    assert Input(store, "a", store.manifests("make")[0]).read_json(name) == {"n": name}
    assert any(key.endswith("préfixe #1/manifests/make/k.json") for key in objects(s3))
    outputs.discard()
    assert [n for n in store.folder.names("data") if n.endswith(".json")] == []


def test_transient_refusals_are_retried(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    s3.fail_every = 3
    executed, runner = run_all(tiny, tmp_path, s3.uri)
    assert executed == ["numbers", "doubled", "total"]
    assert len(s3.requests) >= 12
    assert Input(runner.store, "total", runner.done["total"]).read_json() == {"sum": 20.0}


def test_an_outage_before_a_stage_stops_it_before_its_work(
    tiny: Tiny, tmp_path: Path, s3: S3Server, impatient: None
) -> None:
    runner = tiny.runner(tmp_path, store=s3.uri)
    s3.down = True
    with pytest.raises(StorageError) as caught:
        runner.execute(tiny.stages[0])
    assert s3.uri in str(caught.value)
    assert "/numbers/" in str(caught.value)
    assert "remedy:" in str(caught.value)
    assert tiny.calls == []


def test_an_outage_during_a_stage_names_the_object_and_keeps_the_checkpoints(
    tiny: Tiny, tmp_path: Path, s3: S3Server, impatient: None
) -> None:
    runner = tiny.runner(tmp_path, store=s3.uri)

    def outage(run: Any) -> None:
        (run.scratch / "checkpoint").write_text("half")
        s3.down = True

    tiny.during = outage
    with pytest.raises(StorageError, match=r"/data/numbers/\w+/numbers/table\.parquet"):
        runner.execute(tiny.stages[0])
    assert list((tmp_path / "home/scratch").rglob("checkpoint"))
    s3.down = False
    tiny.during = lambda run: None
    assert runner.execute(tiny.stages[0])[1] is False


def test_a_missing_bucket_is_said_before_the_work(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    runner = tiny.runner(tmp_path, store="s3://no-such-bucket/x")
    with pytest.raises(StorageError, match="no-such-bucket"):
        runner.execute(tiny.stages[0])
    assert tiny.calls == []


def test_an_outage_is_reported_when_the_patience_is_over(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "PATIENCE_S", PATIENCE_S)
    s3.requests.clear()
    s3.down = True
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"a store/x: cannot write.*tried again for \d+ s"):
        Folder(s3.uri).put("x", b"", replace=False)
    assert PATIENCE_S <= time.monotonic() - start < PATIENCE_S + LAST_ATTEMPT_S
    assert len(s3.requests) >= 2


def test_an_outage_that_ends_in_time_is_survived(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(s3_module, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(s3_module, "TELL_AFTER_S", 1.0)
    s3.down = True
    end = threading.Timer(3, lambda: setattr(s3, "down", False))
    end.start()
    assert Folder(s3.uri).put("x", b"content", replace=False)
    end.join()
    assert Folder(s3.uri).read("x") == b"content"
    assert "trying again" in capfd.readouterr().err


def test_what_waiting_cannot_mend_is_said_at_once(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = time.monotonic()
    with pytest.raises(StorageError, match="NoSuchBucket"):
        Folder("s3://no-such-bucket/x").put("x", b"", replace=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")
    with pytest.raises(StorageError, match="credentials"):
        Folder(s3.uri).read("x")
    assert time.monotonic() - start < s3_module.PATIENCE_S / 4


def test_an_upload_that_a_dead_process_left_in_parts_is_found_and_freed(s3: S3Server) -> None:
    bucket = s3.uri.split("/")[2]
    for key in ("a store/data/x/big", "elsewhere/big"):
        client(s3).create_multipart_upload(Bucket=bucket, Key=key)
    folder = Folder(s3.uri)
    (left,) = folder.unfinished_uploads("data")
    assert left.name == "data/x/big"
    folder.abort(left)
    folder.abort(left)
    assert folder.unfinished_uploads("") == []
    assert len(client(s3).list_multipart_uploads(Bucket=bucket)["Uploads"]) == 1


@pytest.mark.parametrize("operation", ["read", "write", "list", "upload", "download", "delete"])
def test_each_operation_says_what_it_could_not_reach(
    s3: S3Server, impatient: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, operation: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    folder, file = Folder(s3.uri), tmp_path / "file"
    file.write_text("x")
    call = {
        "read": lambda: folder.read("x"),
        "write": lambda: folder.put("x", b"", replace=False),
        "list": lambda: folder.names("x"),
        "upload": lambda: folder.upload(file, "x"),
        "download": lambda: folder.download("x", tmp_path / "y", tmp_path),
        "delete": lambda: folder.delete_folder("x"),
    }[operation]
    with pytest.raises(StorageError, match=f"a store/x: cannot {operation}"):
        call()


def test_a_new_address_in_the_environment_is_heeded(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = S3Server()
    try:
        Folder(s3.uri).put("x", b"here", replace=True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", other.endpoint)
        Folder(s3.uri).read("x")
        assert other.requests
    finally:
        other.close()


@pytest.mark.parametrize(
    "uri", ["s3://user:secret-word@bucket/x", "gs://user:secret-word@h/x", "s3://secret-word@b"]
)
def test_an_address_with_credentials_is_refused_without_repeating_them(uri: str) -> None:
    with pytest.raises(UsageError, match="holds credentials") as caught:
        open_uri(uri)
    assert "secret-word" not in repr(caught.value)
    assert "AWS_ACCESS_KEY_ID" in str(caught.value)


def test_an_endpoint_with_credentials_is_refused_without_repeating_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:secret-word@localhost:9000")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL") as caught:
        open_uri("s3://bucket/x")
    assert "secret-word" not in repr(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "s3://",
        "s3:///key",
        "gs://bucket/x",
        "file://relative/x",
        "https://host/x",
        "~no-such-user/x",
    ],
)
def test_an_address_that_cannot_be_is_a_usage_error(uri: str) -> None:
    with pytest.raises(UsageError, match="cannot open"):
        open_uri(uri)


def test_an_endpoint_without_a_scheme_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL"):
        open_uri("s3://bucket/x")


def test_file_uris_and_plain_paths_name_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "mes données #1"
    assert open_uri(folder.as_uri())[1] == open_uri(str(folder))[1] == str(folder)


def test_a_store_behind_a_file_is_a_storage_error(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        tiny.runner(tmp_path, store=str(tmp_path / "file")).execute(tiny.stages[0])


def test_parquet_on_s3_equals_parquet_on_disk(s3: S3Server, tmp_path: Path) -> None:
    table = pa.table({"n": list(range(1000)), "s": ["é"] * 1000})
    digests = set()
    for uri in (str(tmp_path / "store"), s3.uri):
        outputs = Outputs(Store(uri, tmp_path / "f"), "make", ("a",), tmp_path / "staging")
        outputs["a"].write_table(table)
        digests.add(outputs.seal()["a"]["digest"])
    assert len(digests) == 1
