"""Storage: outside data read from an S3 server that fails.

A store that does not answer is no fault of the data: reading completes, or ends with object,
operation and the way to go on, and never calls a file damaged.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from clean_data import clean_tables, write, write_amazon, write_kuairand, write_movielens
from fault_suite import LONG, Record
from faulty_s3 import FaultyS3

from components.data.readers import objects
from components.data.source import open_source
from components.pipeline import s3 as s3_of_the_platform
from components.pipeline.errors import DataContractError, StorageError

pytestmark = pytest.mark.slow

PARTS = 60 if LONG else 5
FAULTS = {
    "1 in 3 requests 503": {"refuse": 1 / 3},
    "1 in 3 bodies truncated": {"truncate": 1 / 3},
    "1 in 3 connections reset": {"reset": 1 / 6, "reset_within": 1 / 6},
}
LAST_ATTEMPT_S = 10.0


def write_parts(folder: Path) -> Path:
    tables = clean_tables()
    data = tables.pop("interactions")
    write(folder, tables)
    starts = np.linspace(0, data.num_rows, PARTS + 1).astype(int).tolist()
    parts = {
        f"part-{n:03d}": data.slice(start, end - start)
        for n, (start, end) in enumerate(pairwise(starts))
    }
    write(folder / "interactions", parts)
    return folder


FORMATS = {
    "tables": write_parts,
    "kuairand": write_kuairand,
    "amazon": write_amazon,
    "movielens": write_movielens,
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyS3]:
    with FaultyS3(tmp_path_factory.mktemp("server")) as server:
        server.make_bucket("bkt")
        yield server


@pytest.fixture(scope="module")
def folders(s3: FaultyS3, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Clean data of each format: in a local folder, and in the bucket under its name."""
    client = s3.client()
    made = {}
    for name, writer in FORMATS.items():
        made[name] = writer(tmp_path_factory.mktemp("data") / name)
        for file in made[name].rglob("*"):
            if file.is_file():
                client.upload_file(str(file), "bkt", f"{name}/{file.relative_to(made[name])}")
    return made


@pytest.fixture
def faulty(s3: FaultyS3, folders: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    yield s3
    s3.fail()


def tables_of(uri: str) -> dict[str, pa.Table]:
    return {
        name: pa.Table.from_batches(stream()) for name, stream in open_source(uri).tables.items()
    }


@pytest.mark.parametrize(
    ("format", "fault"),
    [(format, fault) for format in FORMATS for fault in FAULTS]
    if LONG
    else list(zip(["tables", "kuairand", "amazon"], FAULTS, strict=True)),
)
def test_what_passes_is_survived(
    format: str,
    fault: str,
    faulty: FaultyS3,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    record: Record,
) -> None:
    # Several requests a file, so that faults strike within pages and blocks as well.
    monkeypatch.setattr(objects, "READ_AHEAD", 1 << 13)
    faulty.fail(seed=1, **FAULTS[fault])
    found = tables_of(f"s3://bkt/{format}")
    assert sum(faulty.counts().get(kind, 0) for kind in FAULTS[fault]) >= 3
    faulty.fail()
    assert found == tables_of(str(folders[format]))
    record(f"source data: {fault}", "completed")


@pytest.mark.parametrize("format", FORMATS if LONG else ["tables", "amazon"])
def test_a_server_that_dies_is_no_damage_of_the_data(
    format: str, faulty: FaultyS3, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    monkeypatch.setattr(s3_of_the_platform, "PATIENCE_S", 0.5)
    source = open_source(f"s3://bkt/{format}")
    faulty.kill()
    start = time.monotonic()
    try:
        with pytest.raises(StorageError) as caught:
            for _ in source.tables["interactions"]():
                pass
    finally:
        faulty.restart()
    assert time.monotonic() - start < 0.5 + LAST_ATTEMPT_S
    assert str(caught.value.where).startswith(f"s3://bkt/{format}/")
    assert caught.value.what.startswith("cannot read: ")
    assert "same command again" in str(caught.value.remedy)
    assert caught.value.exit_code == 4
    record("source data: server never comes back", "stopped well")


def test_an_object_replaced_while_it_is_read_is_told(faulty: FaultyS3) -> None:
    source = open_source("s3://bkt/movielens")
    before = faulty.client().get_object(Bucket="bkt", Key="movielens/ratings.dat")["Body"].read()
    faulty.client().put_object(Bucket="bkt", Key="movielens/ratings.dat", Body=before + before)
    try:
        with pytest.raises(StorageError, match=r"(?i)precondition|412"):
            list(source.tables["interactions"]())
    finally:
        faulty.client().put_object(Bucket="bkt", Key="movielens/ratings.dat", Body=before)


def test_damage_of_an_object_is_still_damage(faulty: FaultyS3, folders: dict[str, Path]) -> None:
    (part,) = (p for p in folders["tables"].rglob("part-003.parquet"))
    data = part.read_bytes()
    faulty.client().put_object(Bucket="bkt", Key="cut/interactions.parquet", Body=data[:-20])
    with pytest.raises(DataContractError, match="cut off"):
        open_source("s3://bkt/cut")
