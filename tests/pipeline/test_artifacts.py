"""Artifacts are whole or absent, checked when opened, and never unpickled."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_stages import Tiny

from components.pipeline.artifacts import Input, Manifest, Outputs, Store
from components.pipeline.errors import CorruptArtifactError, StageError, StorageError
from components.pipeline.table_writer import ROW_GROUP

HERE = Path(__file__).resolve().parent
COMPONENTS = HERE.parent.parent / "components"


def script(name: str, *arguments: str, timeout: float = 120) -> Any:
    """Run a script of this folder in a process of its own and read the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / name), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent.parent}"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"), tmp_path / "fetched")


def publish(store: Store, tmp_path: Path, fill: Any, key: str = "k") -> Input:
    """The artifact `a` that `fill(output)` writes."""
    outputs = Outputs(store, "make", ("a",), tmp_path / "staging")
    fill(outputs["a"])
    body = {"stage": "make", "key": key, "outputs": outputs.seal()}
    return Input(store, "a", store.publish(Manifest(body), replace=False))


def file_of(store: Store, artifact: Input, name: str) -> Path:
    record = artifact.manifest["outputs"]["a"]
    return Path(store.folder.path(f"{record['path']}/{name}"))


# Atomic publication


def test_a_stage_killed_at_any_instant_leaves_nothing_half_written_and_its_rerun_succeeds(
    tmp_path: Path,
) -> None:
    seen = script("killed_runs.py", str(tmp_path), str(tmp_path / "store"), "20")
    assert len(seen) >= 20
    assert set(seen) == {0, 1}, "kills should fall before and after publication"


def test_of_concurrent_runs_of_one_key_exactly_one_executes(tmp_path: Path) -> None:
    said = script("concurrent_runs.py", str(tmp_path), "5")
    assert said["executions"] == 1
    assert sorted(said["cached"]) == [False, True, True, True, True]
    assert len(set(said["digests"])) == 1
    assert said["locks_left"] == []


def test_the_first_of_two_publishers_wins_and_both_read_the_same(
    store: Store, tmp_path: Path
) -> None:
    first = publish(store, tmp_path, lambda a: a.write_json({"by": "first"}))
    second = publish(store, tmp_path, lambda a: a.write_json({"by": "second"}))
    assert first.read_json() == second.read_json() == {"by": "first"}


def test_a_manifest_can_be_read_by_others_of_the_same_machine(store: Store, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        publish(store, tmp_path, lambda a: a.write_json(1))
    finally:
        os.umask(umask)
    manifest = tmp_path / "store" / "manifests" / "make" / "k.json"
    assert manifest.stat().st_mode & 0o777 == 0o644


def test_published_files_are_read_only(store: Store, tmp_path: Path) -> None:
    artifact = publish(store, tmp_path, lambda a: a.write_json(1))
    assert file_of(store, artifact, "data.json").stat().st_mode & 0o222 == 0


def test_discarded_outputs_leave_no_file(store: Store, tmp_path: Path) -> None:
    outputs = Outputs(store, "make", ("a", "b"), tmp_path / "staging")
    outputs["a"].write_json(1)
    outputs.discard()
    assert not [p for p in (tmp_path / "store").rglob("*") if p.is_file()]


# Corruption


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    replace(file, bytes(content))


def truncate(file: Path) -> None:
    replace(file, file.read_bytes()[:-1])


def delete(file: Path) -> None:
    file.unlink()


def replace(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


@pytest.mark.parametrize("harm", [flip_a_byte, truncate, delete])
def test_a_harmed_file_is_named_with_the_remedy(store: Store, tmp_path: Path, harm: Any) -> None:
    table = pa.table({"n": list(range(100))})
    artifact = publish(store, tmp_path, lambda a: a.write_table(table))
    assert artifact.read_table() == table
    harm(file_of(store, artifact, "table.parquet"))
    again = Input(store, "a", Manifest(artifact.manifest))
    with pytest.raises(CorruptArtifactError) as caught:
        again.read_table()
    assert "table.parquet" in str(caught.value)
    assert "reelflow stage make --force" in str(caught.value)


def harmed_manifests() -> list[Any]:
    def text(change: Any) -> Any:
        def harm(file: Path) -> None:
            content = json.loads(file.read_bytes())
            change(content)
            file.write_text(json.dumps(content))

        return harm

    return [
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-9]), id="cut"),
        pytest.param(lambda file: file.write_bytes(b""), id="empty"),
        pytest.param(lambda file: file.write_bytes(b"\xff\xfe"), id="not-text"),
        pytest.param(lambda file: file.write_text("[]"), id="not-a-manifest"),
        pytest.param(text(lambda c: c["body"].update(key="other")), id="altered"),
        pytest.param(text(lambda c: c.update(format=99)), id="format"),
    ]


@pytest.mark.parametrize("harm", harmed_manifests())
def test_a_harmed_manifest_is_named_and_force_mends_it(
    tiny: Tiny, tmp_path: Path, harm: Any
) -> None:
    tiny.run(tmp_path)
    (manifest,) = (tmp_path / "store" / "manifests" / "numbers").glob("*.json")
    harm(manifest)
    with pytest.raises(CorruptArtifactError) as caught:
        tiny.run(tmp_path)
    assert str(manifest) in str(caught.value)
    assert "with the same options as before: reelflow stage numbers --force" in str(caught.value)
    runner = tiny.runner(tmp_path)
    runner.plan(tiny.stages, frozenset(["numbers"]))
    assert runner.execute(tiny.stages[0], force=True)[1] is False
    assert tiny.run(tmp_path) == []


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/../../b"])
def test_a_manifest_cannot_name_a_file_outside_the_store(
    store: Store, tmp_path: Path, name: str
) -> None:
    record = {"path": "data/make/x/a", "digest": "d", "files": [{"name": name}]}
    hostile = Manifest({"stage": "make", "key": "k", "outputs": {"a": record}})
    store.folder.put("manifests/make/k.json", hostile.to_bytes(), replace=True)
    with pytest.raises(CorruptArtifactError, match="outside the store"):
        store.manifest("make", "k")


def test_a_symbolic_link_is_refused_and_its_target_left_alone(store: Store, tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    mode = precious.stat().st_mode

    def link(output: Any) -> None:
        Path(output.path("link.txt")).symlink_to(precious)

    with pytest.raises(StageError, match=r"symbolic link 'link\.txt'"):
        publish(store, tmp_path, link)
    assert precious.stat().st_mode == mode


# What is written and read


def test_arrays_and_tensors_come_back_bitwise(store: Store, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {"x": random.normal(size=(3, 4)).astype(np.float32), "i": np.arange(5)}
    tensors = {"w": torch.randn(4, 3).T, "h": torch.randn(7).to(torch.bfloat16)}

    def write(output: Any) -> None:
        output.save_state_dict(arrays, name="arrays.safetensors")
        output.save_state_dict(tensors, {"note": "naïve ☕", "a": "b"})

    artifact = publish(store, tmp_path, write)
    for name, array in artifact.load_arrays("arrays.safetensors").items():
        np.testing.assert_array_equal(array, arrays[name])
    loaded = artifact.load_state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    from safetensors import safe_open

    with safe_open(artifact.path("model.safetensors"), "pt") as file:
        assert file.metadata() == {"note": "naïve ☕", "a": "b"}


def test_the_same_tensors_and_metadata_give_the_same_bytes(store: Store, tmp_path: Path) -> None:
    # safetensors keeps metadata in a hash map that is ordered anew at each call.
    metadata = {f"key{i}": str(i) for i in range(12)}
    digests = set()
    for attempt in range(4):

        def write(output: Any) -> None:
            output.save_state_dict({"x": np.ones(3), "y": np.zeros(2)}, metadata)

        artifact = publish(store, tmp_path, write, key=str(attempt))
        digests.add(hashlib.sha256(Path(artifact.path("model.safetensors")).read_bytes()).digest())
    assert len(digests) == 1


def test_dictionaries_are_made_where_values_repeat(store: Store, tmp_path: Path) -> None:
    lists, moment = pa.list_(pa.int32()), pa.timestamp("ms", tz="UTC")
    table = pa.table(
        {
            "id": pa.array([1, 2, 3]),
            "text": pa.array(["a", "b", "a"]),
            "items": pa.array([[1], [2, 3], []], lists),
            "pair": pa.array([{"x": 1, "y": 0.5}] * 3),
            "watched": pa.array([0.1, 0.2, 0.3], pa.float32()),
            "at": pa.array([1, 2, 3], moment),
        }
    )
    artifact = publish(store, tmp_path, lambda output: output.write_table(table))
    with pq.ParquetFile(artifact.path("table.parquet")) as file:
        group = file.metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        made = {c.path_in_schema for c in columns if c.has_dictionary_page}
        assert file.read().equals(table)
    assert made == {"id", "text", "items.list.element", "pair.x"}


def test_small_batches_become_full_row_groups(store: Store, tmp_path: Path) -> None:
    rows = ROW_GROUP + 1000
    table = pa.table({"n": pa.array(np.arange(rows))})

    def write(output: Any) -> None:
        with output.writer(table.schema) as writer:
            for batch in table.to_batches(max_chunksize=3000):
                writer.write_batch(batch)

    artifact = publish(store, tmp_path, write)
    assert artifact.rows == rows
    assert artifact.read_table() == table
    with pq.ParquetFile(artifact.path("table.parquet")) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [ROW_GROUP, 1000]


def test_wide_rows_are_written_before_they_fill_the_memory(store: Store, tmp_path: Path) -> None:
    batch = pa.record_batch({"text": ["x" * 2**20] * 10})

    def write(output: Any) -> None:
        with output.writer(batch.schema) as writer:
            for _ in range(20):
                writer.write_batch(batch)

    artifact = publish(store, tmp_path, write)
    with pq.ParquetFile(artifact.path("table.parquet")) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sum(sizes) == 200
    assert max(sizes) <= 80


def test_an_empty_table_keeps_its_schema(store: Store, tmp_path: Path) -> None:
    schema = pa.schema({"a": pa.int64(), "b": pa.list_(pa.string())})

    def write(output: Any) -> None:
        with output.writer(schema):
            pass

    artifact = publish(store, tmp_path, write)
    assert artifact.schema == schema
    assert artifact.rows == 0
    assert list(artifact.batches()) == [] or artifact.read_table().num_rows == 0


def test_a_table_of_other_columns_is_refused_where_it_is_written(
    store: Store, tmp_path: Path
) -> None:
    outputs = Outputs(store, "make", ("a",), tmp_path / "staging")
    with (
        outputs["a"].writer(pa.schema({"a": pa.int64()})) as writer,
        pytest.raises(ValueError, match="b: string"),
    ):
        writer.write_table(pa.table({"b": ["x"]}))


@pytest.mark.parametrize("name", ["two words.json", "影片 é/café.json", "a#b?c%20.json"])
def test_any_file_name_is_kept(store: Store, tmp_path: Path, name: str) -> None:
    artifact = publish(store, tmp_path, lambda a: a.write_json({"n": name}, name))
    assert artifact.files == [name]
    assert artifact.read_json(name) == {"n": name}
    assert sorted(p.name for p in Path(artifact.path()).rglob("*.json")) == [Path(name).name]


def test_a_folder_of_an_artifact_is_checked_as_its_files_are(store: Store, tmp_path: Path) -> None:
    def write(output: Any) -> None:
        output.write_json(1, "mp4/a.json")
        output.write_json(2, "b.json")

    artifact = publish(store, tmp_path, write)
    replace(file_of(store, artifact, "b.json"), b"3")
    assert [p.name for p in Path(artifact.path("mp4")).iterdir()] == ["a.json"]
    with pytest.raises(CorruptArtifactError, match=r"b\.json"):
        artifact.path()


def test_a_file_that_never_was_is_no_corruption(store: Store, tmp_path: Path) -> None:
    artifact = publish(store, tmp_path, lambda a: a.write_json(1))
    with pytest.raises(StageError, match=r"has no file 'model\.safetensors'") as caught:
        artifact.load_arrays()
    assert not isinstance(caught.value, StorageError)
    with pytest.raises(StageError, match="holds no table"):
        artifact.read_table()


def test_json_text_does_not_depend_on_the_locale(store: Store, tmp_path: Path) -> None:
    artifact = publish(store, tmp_path, lambda a: a.write_json({"title": "短视频"}))
    raw = file_of(store, artifact, "data.json").read_bytes()
    assert json.loads(raw.decode("utf-8")) == {"title": "短视频"}


# Nothing unpickles


def unpicklers(tree: ast.AST) -> list[str]:
    """Calls in a module that could execute what a file says."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            banned = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
            found += [f"import {n}" for n in names if n.split(".")[0] in banned]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        call, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}

        def says(name: str, value: bool, keywords: dict[Any, ast.expr] = keywords) -> bool:
            given = keywords.get(name)
            return isinstance(given, ast.Constant) and given.value is value

        if call == "torch.load" and not says("weights_only", True):
            found.append("torch.load without weights_only=True")
        may_pickle = "allow_pickle" in keywords and not says("allow_pickle", False)
        if call in ("np.load", "numpy.load") and may_pickle:
            found.append("np.load with allow_pickle")
        if call.endswith("read_pickle") or call in ("yaml.unsafe_load", "yaml.full_load"):
            found.append(call)
        if call == "yaml.load" and ast.unparse(node.args[1]) not in ("_Loader", "yaml.SafeLoader"):
            found.append(call)
    return found


#: It speaks with a process that it forked itself, over a socket that nobody else holds.
OWN_WIRE = {"pipeline/stage_process.py"}


def test_nothing_in_components_unpickles() -> None:
    guilty = {
        str(file.relative_to(COMPONENTS)): found
        for file in sorted(COMPONENTS.rglob("*.py"))
        if (found := unpicklers(ast.parse(file.read_bytes())))
    }
    assert guilty.keys() == OWN_WIRE


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "np.load(f, allow_pickle=True)",
        "pd.read_pickle(f)",
        "yaml.load(f, yaml.Loader)",
    ],
)
def test_the_search_for_unpicklers_finds_them(source: str) -> None:
    assert unpicklers(ast.parse(source))
