"""`reelflow lineage`: what a result was made from and what was made from it, to both ends."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner
from published import publish, settings_in
from real_services import NewDatabase, S3Server
from tiny_stages import Tiny

from components.pipeline.cli import cli
from components.pipeline.errors import UsageError
from components.pipeline.lineage import Lineage, trace
from components.pipeline.lineage_answer import lines, to_json
from components.pipeline.manifest import Manifest
from components.pipeline.runner import Runner, open_store


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Runner:
    """The three tiny stages, executed."""
    runner = tiny.runner(tmp_path)
    for stage in tiny.stages:
        runner.execute(stage)
    return runner


def ask(runner: Runner, name: str, tracking: str | None = None) -> Lineage:
    # No question about tiny stages reaches the model registry unless a test says so.
    uri = tracking or f"sqlite:///{runner.settings.home / 'none.db'}"
    return trace(runner.store, dataclasses.replace(runner.settings, tracking=uri), name)


def stages(nodes: list[str]) -> list[str]:
    return [node.split("/")[0] for node in nodes]


def key(runner: Runner, stage: str) -> str:
    return runner.done[stage].key


@pytest.mark.parametrize(
    ("name", "above", "below"),
    [
        ("numbers", [], ["doubled", "total"]),
        ("facts", [], ["doubled", "total"]),
        ("doubled", ["numbers"], ["total"]),
        ("total", ["doubled", "numbers"], []),
        ("largest", ["numbers"], ["total"]),
        ("doubled.largest", ["numbers"], ["total"]),
    ],
)
def test_a_result_is_followed_both_ways(
    run: Runner, name: str, above: list[str], below: list[str]
) -> None:
    answer = to_json(ask(run, name))
    assert stages(answer["above"]) == above
    assert stages(answer["below"]) == below
    for node in answer["above"] + answer["below"] + answer["found"]:
        stage = node.split("/")[0]
        assert node == f"{stage}/{key(run, stage)}"


def test_starts_of_keys_and_digests_are_names_too(run: Runner) -> None:
    doubled = run.done["doubled"]
    outside = str(run.done["numbers"].body["external"])
    for name in (doubled.key[:8], doubled.key, doubled.output_digest("doubled")[:6]):
        assert to_json(ask(run, name))["found"] == [f"doubled/{doubled.key}"]
    assert stages(to_json(ask(run, outside[:10]))["found"]) == ["numbers"]
    assert stages(to_json(ask(run, outside[:10]))["below"]) == ["doubled", "total"]


def test_the_newest_is_taken_and_its_inputs_are_those_that_it_read(
    tiny: Tiny, run: Runner, tmp_path: Path
) -> None:
    later = tiny.runner(tmp_path, "numbers.count=9", "doubled.factor=3")
    for stage in tiny.stages:
        later.execute(stage)
    answer = to_json(ask(run, "total"))
    assert answer["found"] == [f"total/{key(later, 'total')}"]
    assert answer["above"] == [f"{s}/{key(later, s)}" for s in ("doubled", "numbers")]
    older = to_json(ask(run, key(run, "total")))
    assert older["above"] == [f"{s}/{key(run, s)}" for s in ("doubled", "numbers")]
    assert older["executions"][f"numbers/{key(run, 'numbers')}"]["params"]["count"] == 5


def test_executions_that_gave_the_same_bytes_share_what_was_made_of_them(
    tiny: Tiny, run: Runner, tmp_path: Path
) -> None:
    again = tiny.runner(tmp_path, "numbers.attempt=1")
    for stage in tiny.stages:
        again.execute(stage)
    assert key(again, "numbers") != key(run, "numbers")
    assert key(again, "doubled") == key(run, "doubled")
    for runner in (run, again):
        assert stages(to_json(ask(run, key(runner, "numbers")))["below"]) == ["doubled", "total"]
    # It was made before the second one existed.
    assert to_json(ask(run, "doubled"))["above"] == [f"numbers/{key(run, 'numbers')}"]


def test_a_metric_has_every_execution_that_gave_it(tiny: Tiny, run: Runner, tmp_path: Path) -> None:
    later = tiny.runner(tmp_path, "numbers.count=9")
    for stage in tiny.stages:
        later.execute(stage)
    answer = ask(run, "largest")
    assert [m.metrics["largest"] for m in answer.executions] == [16.0, 8.0]
    text = "\n".join(lines(answer))
    assert "metric largest: 2 executions, newest first" in text
    assert f"  16         doubled {key(later, 'doubled')[:12]}" in text
    outside = run.done["numbers"].body["external"]
    assert text.count(f"outside, digest {outside[:12]}") >= 2


def test_the_text_is_a_tree_that_says_what_is_special(run: Runner, tiny: Tiny) -> None:
    said = list(lines(ask(run, "doubled")))
    title = f"numbers {key(run, 'numbers')[:12]} of "
    above = next(line for line in said if title in line)
    assert above.startswith("  └─ ")
    assert "outside, digest" in above
    assert said[0].startswith(f"doubled {key(run, 'doubled')[:12]} of ")
    # Defaults are not told.
    assert not [line for line in said if line.startswith("  param")]
    assert said[said.index("what was made from it") + 1].startswith("  └─ total ")


def test_params_that_are_not_the_defaults_are_told(tiny: Tiny, tmp_path: Path) -> None:
    runner = tiny.runner(tmp_path, "doubled.rounding.digits=1", "numbers.count=7")
    for stage in tiny.stages:
        runner.execute(stage)
    said = "\n".join(lines(ask(runner, "doubled")))
    assert "  param   rounding.digits = 1\n" in said
    assert "count=7" in said
    assert "factor" not in said


def test_an_ancestor_that_is_gone_is_said(run: Runner) -> None:
    doubled = run.done["doubled"]
    run.store.folder.delete(f"manifests/doubled/{doubled.key}.json")
    answer = ask(run, "total")
    digest = doubled.output_digest("doubled")
    assert to_json(answer)["missing"] == [
        {"artifact": "doubled", "digest": digest, "read_by": f"total/{key(run, 'total')}"}
    ]
    assert f"  └─ doubled {digest[:12]} is not in this store any more" in "\n".join(lines(answer))
    # From above nothing is known of what was made of it.
    assert "  nothing" in list(lines(ask(run, "numbers")))


def test_what_lost_its_producer_is_still_known_by_those_who_read_it(run: Runner) -> None:
    doubled = run.done["doubled"]
    run.store.folder.delete(f"manifests/doubled/{doubled.key}.json")
    digest = doubled.output_digest("doubled")
    for name in ("doubled", digest, digest[:8]):
        answer = ask(run, name)
        told = to_json(answer)
        assert (told["kind"], told["found"], told["above"]) == ("missing", [], [])
        assert told["below"] == [f"total/{key(run, 'total')}"]
        assert told["missing"] == [
            {"artifact": "doubled", "digest": digest, "read_by": f"total/{key(run, 'total')}"}
        ]
        said = list(lines(answer))
        assert said[0].startswith(f"doubled {digest[:12]} is not in this store any more")
        assert said[1] == "what was made from it"
        assert said[2].startswith(f"  └─ total {key(run, 'total')[:12]}")
    with pytest.raises(UsageError):
        ask(run, doubled.key)


def test_an_unknown_name_gets_near_ones(run: Runner) -> None:
    with pytest.raises(UsageError, match="no stage, artifact, metric or digest 'dubled'") as caught:
        ask(run, "dubled")
    assert "did you mean 'doubled'" in str(caught.value)
    with pytest.raises(UsageError, match="'abcdef123456'"):
        ask(run, "abcdef123456")
    with pytest.raises(UsageError, match="there is no registered model 'tiny/1'") as caught:
        ask(run, "tiny/1")
    assert "none was registered here" in str(caught.value)


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    with pytest.raises(UsageError, match="nothing was published here yet"):
        trace(open_store(settings), settings, "recommender")


def test_an_object_store_answers_alike(tiny: Tiny, tmp_path: Path, s3: S3Server) -> None:
    runner = tiny.runner(tmp_path, store=s3.uri)
    for stage in tiny.stages:
        runner.execute(stage)
    answer = to_json(ask(runner, "total"))
    assert stages(answer["above"]) == ["doubled", "numbers"]


# Registered models.


@dataclasses.dataclass
class Registered:
    """Two versions of a model in a real registry, and the executions that they are made of."""

    runner: Runner
    trained: Manifest
    measured: Manifest


@pytest.fixture(scope="module")
def registered(
    tmp_path_factory: pytest.TempPathFactory, new_database: NewDatabase
) -> Iterator[Registered]:
    import shutil

    import mlflow

    folder = tmp_path_factory.mktemp("registered")
    settings = settings_in(folder)
    settings.home.mkdir()
    shutil.copyfile(new_database.file, settings.home / "mlflow.db")
    store = open_store(settings)
    data = publish(store, "split", "5" * 32, content="rows")
    trained = publish(
        store,
        "train_recommender",
        "a" * 32,
        artifact="recommender",
        inputs={"split": data.output_digest("split")},
    )
    of_model = {"recommender": trained.output_digest("recommender")}
    measured = publish(
        store, "evaluate_recommender", "b" * 32, artifact="evaluation", inputs=of_model
    )
    publish(
        store,
        "register",
        "c" * 32,
        artifact="registration",
        inputs=of_model | {"evaluation": measured.output_digest("evaluation")},
    )
    before = mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(settings.tracking)
    client.create_registered_model("tiny")
    tags = {
        "manifest_key": trained.key,
        "recommender_digest": trained.output_digest("recommender"),
        "evaluation_digest": measured.output_digest("evaluation"),
        "gate": "the first model of this name",
    }
    client.create_model_version("tiny", str(folder / "model"), tags=tags)
    gone = {"manifest_key": "d" * 32, "evaluation_digest": "e" * 64}
    client.create_model_version("tiny", str(folder / "model"), tags=gone)
    client.set_registered_model_alias("tiny", "champion", "1")
    yield Registered(Runner(settings, store, {}), trained, measured)
    mlflow.set_tracking_uri(before)


def test_a_model_is_followed_to_its_data_by_any_of_its_names(registered: Registered) -> None:
    runner = registered.runner
    for name in ("tiny@champion", "tiny/1", "models:/tiny/1", "models:/tiny@champion"):
        answer = trace(runner.store, runner.settings, name)
        found = to_json(answer)
        assert found["found"] == [
            f"train_recommender/{'a' * 32}",
            f"evaluate_recommender/{'b' * 32}",
        ]
        assert stages(found["above"]) == ["split"]
        assert found["models"][0]["aliases"] == ["champion"]
        text = "\n".join(lines(answer))
        assert text.startswith("model tiny version 1 (champion)\n  gate: the first model")


@pytest.mark.parametrize("name", ["split", "recommender", "evaluation"])
def test_data_and_models_lead_to_the_registered_version(registered: Registered, name: str) -> None:
    answer = trace(registered.runner.store, registered.runner.settings, name)
    assert [m.label for m in answer.models] == ["tiny version 1 (champion)"]
    assert list(lines(answer))[-1] == "  model tiny version 1 (champion)"


def test_what_a_version_was_made_from_may_be_gone(registered: Registered) -> None:
    said = "\n".join(lines(trace(registered.runner.store, registered.runner.settings, "tiny/2")))
    assert f"the execution that trained it ({'d' * 12}) is not in this store any more" in said
    assert f"the execution that measured it (evaluation {'e' * 12}) is not" in said


def test_an_unknown_version_gets_near_ones(registered: Registered) -> None:
    with pytest.raises(UsageError) as caught:
        trace(registered.runner.store, registered.runner.settings, "tini/1")
    assert "did you mean 'tiny/1'" in str(caught.value)


def test_a_registry_that_is_silent_hides_nothing_else(registered: Registered) -> None:
    settings = dataclasses.replace(registered.runner.settings, tracking="http://127.0.0.1:9")
    answer = trace(registered.runner.store, settings, "split")
    said = "\n".join(lines(answer))
    assert to_json(answer)["models"] == []
    assert "─ evaluate_recommender" in said
    assert "the model registry cannot be asked: http://127.0.0.1:9" in said
    with pytest.raises(UsageError, match="the model registry cannot be asked"):
        trace(registered.runner.store, settings, "tiny/1")


# The command.


@pytest.fixture
def home(registered: Registered, monkeypatch: pytest.MonkeyPatch) -> Path:
    settings = registered.runner.settings
    monkeypatch.setenv("REELFLOW_HOME", str(settings.home))
    for name in ("ARTIFACT_ROOT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return settings.home


def test_the_command_prints_text_or_json(home: Path) -> None:
    said = CliRunner().invoke(cli, ["lineage", "recommender"])
    assert said.exit_code == 0, said.output
    assert said.output.startswith(f"train_recommender {'a' * 12} of ")
    as_json: dict[str, Any] = json.loads(
        CliRunner().invoke(cli, ["lineage", "recommender", "--json"]).stdout
    )
    assert as_json["kind"] == "execution"
    assert as_json["models"][0]["executions"]


def test_the_shell_completes_stages_artifacts_and_metrics(run: Runner, home: Path) -> None:
    def completed(text: str) -> list[str]:
        given = ["lineage", "--store", run.store.uri]
        found = ShellComplete(cli, {}, "reelflow", "_REELFLOW_COMPLETE").get_completions(
            given, text
        )
        return [item.value for item in found]

    assert completed("nu") == ["numbers", "numbers.rows"]
    assert completed("doubled.") == ["doubled.largest"]
