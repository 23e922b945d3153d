"""Claims about registration, on real MLflow: what a version holds, who is champion, what a kill
leaves."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from registration_world import (
    ITEMS,
    NAME,
    USERS,
    Model,
    aliases,
    exhaustive_lists,
    first_catalogue,
    give_run,
    histories,
    later_catalogue,
    model_files,
    registry_at,
    requests,
    versions,
)
from stage_harness import Bench

from components.evaluation.registration import registry
from components.evaluation.registration.gate import per_user
from components.evaluation.registration.serving import ServedRecommender, requests_table
from components.evaluation.registration.stage import RegisterParams, register, tracking_server
from components.pipeline import gc
from components.pipeline.errors import StageError, StorageError
from components.pipeline.manifest import Manifest
from components.pipeline.references import read_references
from components.pipeline.settings import Settings, load_settings
from components.pipeline.tracking import FlowTracker, connect

GOOD, BAD = np.ones(USERS, int), np.zeros(USERS, int)
FIRST, LATER = Model(first_catalogue(), seed=1), Model(later_catalogue(), seed=2)


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made once: the migrations of MLflow take seconds."""
    home = tmp_path_factory.mktemp("migrated")
    connect(Settings(home, "", f"sqlite:///{home / 'mlflow.db'}", None, None))
    return home / "mlflow.db"


@pytest.fixture
def mlflow(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    with registry_at(tmp_path / "home", database, monkeypatch.setenv) as module:
        yield module


@pytest.fixture
def bench(mlflow: Any, tmp_path: Path) -> Bench:
    """A bench with a registry that nobody has used."""
    return Bench(tmp_path / "bench")


def run_once(bench: Bench, model: Model = FIRST, ranks: np.ndarray = GOOD) -> dict[str, Any]:
    """Register a model whose evaluation found these ranks; the record of the stage."""
    give_run(bench, model, histories(ITEMS), ranks)
    bench.run(register, RegisterParams())
    return dict(bench.artifacts["registration"].read_json())


def version_folder(mlflow: Any, tmp_path: Path, number: str = "1") -> Path:
    return registry.fetch(mlflow, NAME, number, tmp_path / "fetched_version")


def stored_file(tmp_path: Path, pattern: str) -> Path:
    """A file of the only version, where MLflow keeps it."""
    (file,) = (tmp_path / "home" / "mlflow-artifacts").rglob(pattern)
    return Path(file)


def test_the_first_model_is_champion_and_answers_through_mlflow_as_its_files_do(
    mlflow: Any, bench: Bench
) -> None:
    record = run_once(bench)
    assert (record["version"], record["decision"]) == ("1", "champion")
    assert record["previous_champion"] is None
    assert aliases(mlflow) == {"champion": "1"}
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    direct = ServedRecommender.from_files(model_files(bench))
    rows = requests(first_catalogue())
    frames = [
        pd.DataFrame(rows),
        pd.DataFrame(rows)[["item_ids", "positive"]],
        pd.DataFrame({"item_ids": [[1000, 1003], [], [7, 1000, 8]]}),
        pd.DataFrame({"item_ids": [np.array([1000, 1003])], "watch_time_s": [np.array([1, 2.5])]}),
        pd.DataFrame(
            {
                "item_ids": [[1000], [1003], [1006]],
                "user_id": [27, 38, 49],
                "user_features": [{"age": "1"}, {}, None],
            }
        ),
    ]
    for frame in frames:
        expected = direct.recommend(requests_table(frame)).to_pydict()
        answers = model.predict(frame)
        assert answers["item_ids"].tolist() == expected["item_ids"]
        assert answers["scores"].tolist() == expected["scores"]
    short = model.predict(frames[2], params={"top_n": 3, "beams": 2})
    expected = direct.recommend(requests_table(frames[2]), top_n=3, beams=2).to_pydict()
    assert short["item_ids"].tolist() == expected["item_ids"]
    # The width that was evaluated is the width that is served.
    assert model.metadata.get_params_schema().to_dict()[1]["default"] == 64


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({"items": [[1000]]}, r"missing inputs \['item_ids'\]"),
        ({"item_ids": [["a"]]}, "Failed to enforce schema"),
        ({"item_ids": [[1000]], "positive": [[3.5]]}, "Failed to enforce schema"),
    ],
)
def test_a_request_that_breaks_the_signature_is_refused(
    mlflow: Any, bench: Bench, frame: dict[str, Any], message: str
) -> None:
    run_once(bench)
    model = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    with pytest.raises(mlflow.MlflowException, match=message):
        model.predict(pd.DataFrame(frame))


def test_a_version_holds_data_and_source_and_nothing_to_unpickle(
    mlflow: Any, bench: Bench, tmp_path: Path
) -> None:
    run_once(bench)
    folder = version_folder(mlflow, tmp_path)
    assert {path.name for path in (folder / "artifacts").iterdir()} == set(model_files(bench))
    files = [path for path in folder.rglob("*") if path.is_file()]
    kinds = {path.suffix or path.name for path in files}
    data = {".safetensors", ".json", ".parquet"}
    text = {".py", ".yaml", ".txt", "MLmodel", "registered_model_meta"}
    assert data < kinds <= data | text
    for path in files:
        if path.suffix != ".safetensors" and path.suffix != ".parquet":
            path.read_text(encoding="utf-8")
    code = {path.stem for path in files if path.suffix == ".py"}
    assert {"recommender_model", "serving", "recommender", "decode"} <= code
    assert not {"cli", "runner", "stage"} & code


def test_a_version_answers_in_a_process_that_has_only_its_own_code(
    mlflow: Any, bench: Bench, tmp_path: Path
) -> None:
    run_once(bench)
    program = f"""
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model("models:/{NAME}@champion")
answer = model.predict(pandas.DataFrame({{"item_ids": [[1000, 1003]]}}))
import components
print(json.dumps([components.__file__, answer["item_ids"][0]]))
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/", check=False
    )
    assert said.returncode == 0, said.stderr
    where, answer = json.loads(said.stdout.splitlines()[-1])
    assert str(tmp_path / "home" / "mlflow-artifacts") in where
    direct = ServedRecommender.from_files(model_files(bench))
    requests = requests_table(pd.DataFrame({"item_ids": [[1000, 1003]]}))
    assert [answer] == direct.recommend(requests)["item_ids"].to_pylist()


def test_folders_of_any_name_make_the_same_version(
    mlflow: Any, bench: Bench, tmp_path: Path
) -> None:
    """Artifacts fetched from an object store lie in folders that bear their digests."""
    FIRST.fill(bench)
    files = model_files(bench)
    digests = {name: tmp_path / f"{number:064x}" for number, name in enumerate(files)}
    for name, folder in digests.items():
        shutil.copytree(files[name], folder)
    connect(load_settings(), NAME)
    example = pd.DataFrame({"item_ids": [[1000]]})
    registry.log_version(mlflow, NAME, digests, example, {}, beams=8, scratch=tmp_path / "scratch")
    folders = {path.name for path in (version_folder(mlflow, tmp_path) / "artifacts").iterdir()}
    assert folders == set(digests)


def test_a_worse_model_is_challenger_to_a_champion_ranked_anew_on_the_new_catalogue(
    mlflow: Any, bench: Bench
) -> None:
    run_once(bench)
    champion_files = model_files(bench)
    known = set(first_catalogue().tolist())
    examples = histories(ITEMS, seed=1)
    item_ids = later_catalogue()
    for row in examples:
        row["item_ids"] = item_ids[np.array(row["item_index"], int)].tolist()
    lists = exhaustive_lists(champion_files, first_catalogue(), examples)
    for number, row in enumerate(examples):
        # The champion hits, now high now low in its list, wherever the new catalogue lets it.
        wanted = [item for item in lists[number][: 1 + number % 20] if item in item_ids]
        if wanted and number % 4:
            row["target"] = int(np.searchsorted(item_ids, wanted[-1]))
    targets = [int(item_ids[row["target"]]) for row in examples]
    assert any(target not in known for target in targets)
    assert any(item not in known for row in examples for item in row["item_ids"])
    # Half of the users were evaluated, every second one.
    evaluated = slice(None, None, 2)
    give_run(bench, LATER, examples, BAD, evaluated=evaluated)
    bench.run(register, RegisterParams(gate_metric="ndcg_at_20"))
    record = bench.artifacts["registration"].read_json()

    by_hand = [
        items.index(target) + 1 if target in items[:20] else 0
        for items, target in zip(lists, targets, strict=True)
    ][evaluated]
    assert record["gate"]["users"] == len(by_hand) == USERS // 2
    assert record["gate"]["champion"] == pytest.approx(
        per_user("ndcg_at_20", np.array(by_hand)).mean(), abs=1e-12
    )
    assert len(set(by_hand)) > 5
    assert record["gate"]["ours"] == 0
    assert record["decision"] == "challenger"
    assert record["reason"].startswith("is worse than version 1")
    assert record["previous_champion"] == "1"
    assert aliases(mlflow) == {"champion": "1", "challenger": "2"}


def test_a_challenger_that_wins_later_is_the_same_version_and_no_challenger_any_more(
    mlflow: Any, bench: Bench
) -> None:
    run_once(bench)
    run_once(bench, LATER, BAD)
    assert aliases(mlflow) == {"champion": "1", "challenger": "2"}
    record = run_once(bench, LATER, GOOD)
    assert (record["version"], record["decision"]) == ("2", "champion")
    assert aliases(mlflow) == {"champion": "2"}
    assert versions(mlflow) == ["1", "2"]
    tags = mlflow.MlflowClient().get_model_version(NAME, "2").tags
    assert tags["gate"].startswith("beats version 1")
    assert tags["evaluation_digest"] == bench.artifacts["evaluation"].digest


def test_a_run_killed_before_the_alias_leaves_a_harmless_version_that_the_next_takes_over(
    mlflow: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "set_alias", killed)
        with pytest.raises(KeyboardInterrupt):
            run_once(bench)
    assert versions(mlflow) == ["1"]
    assert aliases(mlflow) == {}
    record = run_once(bench)
    assert (record["version"], record["decision"]) == ("1", "champion")
    assert versions(mlflow) == ["1"]


def test_a_better_model_takes_the_alias_over_and_a_run_killed_then_registers_nothing_twice(
    mlflow: Any, bench: Bench
) -> None:
    run_once(bench)
    record = run_once(bench, LATER, GOOD)
    assert (record["version"], record["decision"]) == ("2", "champion")
    assert record["reason"].startswith("beats version 1")
    assert aliases(mlflow) == {"champion": "2"}
    again = run_once(bench, LATER, GOOD)
    assert (again["version"], again["decision"]) == ("2", "champion")
    assert (again["previous_champion"], record["previous_champion"]) == ("1", "1")
    assert again["reason"] == "this model is the champion already, version 2"
    assert versions(mlflow) == ["1", "2"]
    assert aliases(mlflow) == {"champion": "2"}


def test_the_champion_answers_with_the_code_it_was_registered_with(
    bench: Bench, tmp_path: Path
) -> None:
    run_once(bench)
    code = stored_file(tmp_path, "code/components/evaluation/registration/serving.py")
    code.write_text(
        "import argparse, pyarrow.parquet as pq, pyarrow as pa, sys\n"
        "rows = pq.read_metadata(sys.argv[2]).num_rows\n"
        "pq.write_table(pa.table({'item_ids': [[-1]] * rows}), sys.argv[3])\n"
    )
    record = run_once(bench, FIRST, GOOD)
    assert record["reason"].startswith("this model is the champion already")
    record = run_once(bench, LATER, GOOD)
    assert record["gate"]["champion"] == 0


def test_a_champion_that_cannot_run_is_said_with_the_way_out(
    mlflow: Any, bench: Bench, tmp_path: Path
) -> None:
    run_once(bench)
    stored_file(tmp_path, "code/components/training/onerec/model.py").write_text(
        "raise RuntimeError('no such kernel')\n"
    )
    with pytest.raises(StageError, match=r"no such kernel") as caught:
        run_once(bench, LATER)
    assert "take the alias 'champion' off" in str(caught.value)
    assert versions(mlflow) == ["1"]


def test_a_champion_without_files_is_said_with_the_way_out(bench: Bench, tmp_path: Path) -> None:
    run_once(bench)
    shutil.rmtree(tmp_path / "home" / "mlflow-artifacts")
    with pytest.raises(StorageError, match="the files of version 1 cannot") as caught:
        run_once(bench, LATER)
    assert "take the alias 'champion' off" in str(caught.value)


def test_a_flow_gets_the_model_in_the_run_of_its_stage(mlflow: Any, bench: Bench) -> None:
    with (
        FlowTracker(load_settings(), "recommend", {}) as tracker,
        tracker.stage("register", {}) as sink,
    ):
        run_once(bench)
    (model,) = mlflow.search_logged_models(output_format="list")
    assert model.source_run_id == sink.run_id
    assert mlflow.MlflowClient().get_model_version(NAME, "1").run_id == sink.run_id


def test_without_a_flow_the_model_gets_a_run_and_files_below_home(
    mlflow: Any, bench: Bench, tmp_path: Path
) -> None:
    run_once(bench)
    (model,) = mlflow.search_logged_models(output_format="list")
    run = mlflow.get_run(model.source_run_id)
    assert (run.info.run_name, run.info.status) == ("register", "FINISHED")
    assert mlflow.get_experiment(run.info.experiment_id).name == NAME
    assert model.artifact_location.startswith((tmp_path / "home" / "mlflow-artifacts").as_uri())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench", "home"]


def test_an_evaluation_without_our_ranks_is_refused(bench: Bench) -> None:
    give_run(bench, FIRST, histories(ITEMS), GOOD, evaluated=slice(0))
    with pytest.raises(StageError, match="no rank of 'onerec'"):
        bench.run(register, RegisterParams())


def test_gc_keeps_what_a_version_was_made_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*ignored: Any, **options: Any) -> str:
        raise KeyboardInterrupt

    # Before there is a version, the store says what it will need: another gc may come in between.
    with monkeypatch.context() as patch:
        patch.setattr(registry, "log_version", killed)
        with pytest.raises(KeyboardInterrupt):
            run_once(bench)
    (reference,) = read_references(bench.store)
    settings = load_settings()
    assert gc.referenced(settings, bench.store) == (set(), [reference])
    record = run_once(bench)
    assert (reference.model, record["version"]) == (NAME, "1")
    assert [r.needs for r in read_references(bench.store)] == [reference.needs]
    references, gone = gc.referenced(settings, bench.store)
    assert gone == []
    # Nobody but the store tells it to another home.
    elsewhere = replace(settings, tracking=f"sqlite:///{bench.folder / 'none.db'}")
    assert gc.referenced(elsewhere, bench.store) == (set(reference.needs), [])
    assert reference.needs < references
    digests = dict(zip(bench.artifacts, bench.digests(*bench.artifacts), strict=True))

    def manifest(day: int, name: str, digest: str) -> Manifest:
        made = f"2026-01-{day:02d}T00:00:00+00:00"
        outputs = {name: {"digest": digest}}
        body = {"stage": name, "key": f"{day:032x}", "outputs": outputs, "inputs": {}}
        return Manifest(body | {"created_at": made})

    ours = [manifest(1, name, digest) for name, digest in digests.items()]
    newer = [manifest(2, name, "f" * 64) for name in digests]
    for kept in (references, set(reference.needs)):
        freed = {manifest.stage for manifest in gc.unneeded(newer + ours, kept, 2e9)}
        assert freed == {"source", "registration"}


def test_another_registry_is_another_input_and_a_moved_one_is_not(
    database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(uri: str) -> str:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return tracking_server(RegisterParams())

    moved = tmp_path / "moved.db"
    shutil.copyfile(database, moved)
    here = fingerprint(f"sqlite:///{database}")
    assert fingerprint(f"sqlite:///{moved}") == here
    with sqlite3.connect(moved) as connection:
        connection.execute("UPDATE experiments SET creation_time = creation_time + 1")
    assert fingerprint(f"sqlite:///{moved}") != here
    moved.unlink()
    nothing = fingerprint(f"sqlite:///{moved}")
    assert nothing != here
    moved.write_bytes(b"")
    assert fingerprint(f"sqlite:///{moved}") == nothing
    assert fingerprint("https://me:secret@mlflow.example/x") == "https://mlflow.example/x"


def test_planning_looks_at_the_registry_without_importing_mlflow(database: Path) -> None:
    program = """
import sys
from components.evaluation.registration.stage import RegisterParams, tracking_server
print(tracking_server(RegisterParams()))
heavy = {"mlflow", "torch", "pandas", "pyarrow", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"MLFLOW_TRACKING_URI": f"sqlite:///{database}"},
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("sqlite 1")
