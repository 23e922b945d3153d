"""The digest of outside data: it follows content, wherever the data lies, and costs little."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.data.readers import fingerprint as module
from components.data.source import fingerprint, open_source, prepare
from components.pipeline.errors import DataContractError, UsageError


@dataclass(frozen=True)
class Params:
    source: str


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reelflow" / "content-digests.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data set"
    (folder / "items").mkdir(parents=True)
    (folder / "ratings.dat").write_text("1::2::3::4\n")
    (folder / "items" / "0.parquet").write_bytes(b"part")
    return folder


def digest(folder: Path) -> str:
    return fingerprint(Params(str(folder)))


def test_simulator_has_a_constant() -> None:
    assert fingerprint(Params("simulator")) == fingerprint(Params("simulator"))


def test_digest_is_that_of_paths_sizes_and_contents(folder: Path) -> None:
    files = ("items/0.parquet", "ratings.dat")
    lines = [
        f"{name}\0{len(data)}\0{hashlib.sha256(data).hexdigest()}"
        for name in files
        for data in [(folder / name).read_bytes()]
    ]
    assert digest(folder) == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_copy_elsewhere_has_the_same_digest(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(folder)
    assert fingerprint(Params(copy.as_uri())) == digest(folder)


def test_any_change_of_content_or_name_changes_the_digest(folder: Path) -> None:
    seen = [digest(folder)]
    (folder / "ratings.dat").write_text("1::2::3::5\n")
    seen.append(digest(folder))
    (folder / "ratings.dat").rename(folder / "scores.dat")
    seen.append(digest(folder))
    (folder / "items" / "1.parquet").write_bytes(b"")
    seen.append(digest(folder))
    assert len(set(seen)) == 4


def test_files_that_no_reader_opens_do_not_count(folder: Path) -> None:
    before = digest(folder)
    (folder / "README.md").write_text("x")
    (folder / ".ratings.dat.swp").write_text("x")
    (folder / "items" / "_SUCCESS").write_text("")
    (folder / "other").mkdir()
    (folder / "other" / "big.parquet").write_text("x")
    assert digest(folder) == before


def test_unchanged_content_is_hashed_once_and_a_quick_rewrite_is_seen(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digest(folder)
    assert not cache.exists(), "files of this second may change unseen and are not remembered"
    monkeypatch.setattr(module, "RACY_NS", -1)
    assert digest(folder) == first
    assert cache.is_file()

    def refuse(*_: object) -> None:
        raise AssertionError("hashed again")

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", refuse)
        assert digest(folder) == first
    status = (folder / "ratings.dat").stat()
    (folder / "ratings.dat").write_text("1::2::3::9\n")
    os.utime(folder / "ratings.dat", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest(folder) != first


@pytest.mark.parametrize("memory", ["", "[1, 2]", '{"a": '])
def test_broken_memory_is_no_matter(folder: Path, cache: Path, memory: str) -> None:
    before = digest(folder)
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(memory)
    assert digest(folder) == before


def test_unwritable_cache_is_no_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RACY_NS", -1)
    before = digest(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert digest(folder) == before


def test_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataContractError, match="no such folder"):
        digest(tmp_path / "absent")


def test_folder_is_found_under_its_percent_encoded_address(tmp_path: Path, folder: Path) -> None:
    odd = tmp_path / "we#ird é: 100%25 x?"
    folder.rename(odd)
    assert "%23" in odd.as_uri()
    assert fingerprint(Params(odd.as_uri())) == digest(odd)


@pytest.mark.parametrize("source", ["s3://", "s3:///key", "gs://bucket/x", "~no-such-user/x"])
def test_address_that_names_no_folder_is_a_usage_error(source: str) -> None:
    with pytest.raises(UsageError, match="cannot open") as caught:
        fingerprint(Params(source))
    assert caught.value.exit_code == 2
    assert caught.value.remedy


def test_link_to_nothing_is_refused_when_the_run_is_planned(folder: Path) -> None:
    (folder / "movies.dat").symlink_to(folder / "absent")
    with pytest.raises(DataContractError, match=r"movies\.dat: this is a link to nothing"):
        digest(folder)


def test_content_of_a_linked_folder_counts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    part = tmp_path / "elsewhere" / "1.parquet"
    part.write_bytes(b"one")
    (folder / "items" / "day").symlink_to(tmp_path / "elsewhere")
    before = digest(folder)
    part.write_bytes(b"two")
    assert digest(folder) != before


def test_planning_imports_nothing_heavy() -> None:
    code = (
        "import sys, components.data.stage as s;"
        "s.fingerprint(s.IngestParams(source='tests'));"
        "print([m for m in ('pyarrow', 'numpy', 'boto3', 'torch') if m in sys.modules])"
    )
    root = Path(module.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def client() -> Any:
    return boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket of an S3 server in this process."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        client().create_bucket(Bucket="data")
        yield "s3://data"
    server.stop()


def test_bucket_is_read_and_written_like_a_folder(bucket: str, tmp_path: Path) -> None:
    table = pa.table(
        {
            "user_id": [1, 2, 1],
            "item_id": [5, 5, 6],
            "timestamp": pa.array([1, 2, 3], pa.timestamp("ms", "UTC")),
        }
    )
    local = tmp_path / "local"
    for day, start in (("2024-01-01", 0), ("2024-01-02", 2)):
        part = local / "interactions" / f"date={day}"
        part.mkdir(parents=True)
        pq.write_table(table.slice(start, 2), part / "0.parquet")
    for file in local.rglob("*.parquet"):
        client().upload_file(str(file), "data", f"raw/{file.relative_to(local).as_posix()}")

    here, there = open_source(str(local)), open_source(f"{bucket}/raw")
    for name in here.tables:
        assert list(here.tables[name]()) == list(there.tables[name]())
    assert prepare(f"{bucket}/raw", f"{bucket}/out") == {"interactions": 3, "items": 2, "users": 2}
    again = open_source(f"{bucket}/out/")
    assert list(again.tables["interactions"]()) == list(here.tables["interactions"]())


def test_digest_of_a_bucket_follows_its_content(bucket: str) -> None:
    store = client()
    store.put_object(Bucket="data", Key="f/ratings.dat", Body=b"1::2::3::4\n")
    first = fingerprint(Params(f"{bucket}/f"))
    store.put_object(Bucket="data", Key="f/notes.txt", Body=b"x")
    store.put_object(Bucket="data", Key="far/ratings.dat", Body=b"x")
    assert fingerprint(Params(f"{bucket}/f/")) == first
    store.put_object(Bucket="data", Key="f/ratings.dat", Body=b"1::2::3::5\n")
    assert fingerprint(Params(f"{bucket}/f")) != first


def test_absent_places_of_a_store_are_refused(bucket: str) -> None:
    for uri in (f"{bucket}/absent", "s3://no-such-bucket/x"):
        with pytest.raises(DataContractError, match="no such folder"):
            fingerprint(Params(uri))
    with pytest.raises(DataContractError, match="no such folder"):
        open_source(f"{bucket}/absent")
