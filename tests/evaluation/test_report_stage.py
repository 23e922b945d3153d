"""The report stage reads a run through its artifacts and manifests, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from report_run import Content, build, changed, run_report

from components.evaluation.report import collect
from components.evaluation.report.stage import ReportParams
from components.pipeline.errors import DataContractError


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (run_report(tmp_path / name) for name in ("a", "b"))
    assert first == second


def test_parameters_decide_how_much_is_shown(tmp_path: Path) -> None:
    few = run_report(tmp_path / "few", params={"example_users": 2, "recommendations": 3})
    many = run_report(tmp_path / "many", params={"example_users": 12, "history": 3, "seed": 5})
    assert few.count('class="person"') == 2
    assert many.count('class="person"') == 12
    assert max(len(h.split("<li")) - 1 for h in many.split('class="history"')[1:]) >= 3
    assert "the newest 3 events" in many


MODEL = "recommender-simulator version 3"
GATE = Content().json["registration"]["gate"]
NO_RIVAL = {"champion": None, "difference": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("change", "headline", "standing", "reason"),
    [
        ({}, f"{MODEL} beats version 2", "champion", "(95 % interval +0.0012 to +0.0050)."),
        (
            {"previous_champion": None, "gate": NO_RIVAL, "reason": "the first of its name"},
            f"{MODEL} is the first champion",
            "champion",
            "The first of its name.",
        ),
        (
            {"decision": "challenger", "gate": GATE | {"low": -0.001}},
            f"{MODEL} does not replace version 2",
            "challenger",
            "(95 % interval −0.0010 to +0.0050). The interval includes 0: it does not beat it.",
        ),
        (
            {"decision": "challenger", "gate": GATE | {"high": -0.001, "low": -0.004}},
            f"{MODEL} does not replace version 2",
            "challenger",
            "(95 % interval −0.0040 to −0.0010). It is worse.",
        ),
        (
            {
                "decision": "challenger",
                "gate": GATE | {"difference": None, "low": None, "high": None},
                "reason": "cannot be compared with version 2 over 5 users",
            },
            f"{MODEL} does not replace version 2",
            "challenger",
            "Cannot be compared with version 2 over 5 users.",
        ),
        (
            {"decision": "not_registered", "gate": {}, "reason": "no registry"},
            "The model was not registered",
            "not registered",
            "No registry.",
        ),
    ],
)
def test_the_headline_tells_what_became_of_the_model(
    tmp_path: Path, change: dict[str, Any], headline: str, standing: str, reason: str
) -> None:
    content = changed(lambda c: c.json["registration"].update(change))
    verdict = collect.read_verdict(build(tmp_path, content)["registration"])
    assert (verdict.headline, verdict.standing) == (headline, standing)
    assert reason in verdict.reason
    assert (verdict.model is None) == (standing == "not registered")


def test_the_report_reads_what_the_comparison_and_the_gate_write(tmp_path: Path) -> None:
    """The writers' own code makes the JSON, so that a change of their format fails here."""
    import numpy as np

    from components.evaluation.ranking.comparison import Tally, summarise
    from components.evaluation.registration.gate import judge

    rng = np.random.default_rng(0)
    target_B = rng.integers(0, 60, 200)
    histories = pa.array([[1, 2, 3]] * 200, pa.list_(pa.int32()))
    users = pa.RecordBatch.from_pydict(
        {"user_id": np.arange(200), "target": target_B, "item_index": histories}
    )
    tally = Tally(["onerec", "popularity"], (5, 10, 20))
    for name, skill in (("onerec", 0.6), ("popularity", 0.1)):
        lists_BK = np.stack([rng.permutation(60)[:20] for _ in range(200)]).astype(np.int32)
        lists_BK[rng.random(200) < skill, 0] = -1
        known = lists_BK[:, 0] < 0
        lists_BK[known, 0] = target_B[known]
        tally.add(name, users, lists_BK, np.zeros_like(lists_BK, bool))
    content = Content()
    content.json["evaluation"] = summarise(tally, "onerec", seed=0) | {"catalogue_size": 60}
    verdict = judge("ndcg_at_10", tally.ranks("onerec"), tally.ranks("popularity"), "version 2", 0)
    content.json["registration"] |= {
        "decision": verdict.decision,
        "reason": verdict.reason,
        "gate": verdict.to_json(),
    }
    inputs = build(tmp_path, content)
    evaluation = collect.read_evaluation(inputs["evaluation"])
    assert evaluation.ours == "onerec"
    assert {d.outcome for d in evaluation.differences if d.metric == "ndcg_at_10"} == {"beats"}
    ours = evaluation.methods[0]
    assert ours.users == 200
    assert ours.metrics.keys() == ours.masked.keys() >= {"ndcg_at_10", "hr_at_20"}
    assert 0 < (ours.distinct_items or 0) <= 60
    told = collect.read_verdict(inputs["registration"])
    assert told.headline == f"{MODEL} beats version 2"
    assert told.reason.startswith("NDCG@10 is ")


@pytest.mark.parametrize(
    ("artifact", "key"),
    [
        ("registration", "decision"),
        ("evaluation", "methods"),
        ("evaluation", "differences"),
        ("semantic_ids", "codebook_size"),
        ("semantic_ids", "moved"),
        ("sasrec", "cut_short"),
        ("alignment_curve", "steps"),
        ("alignment_curve", "ndcg_floor"),
        ("data_health", "tables"),
        ("source", "split"),
    ],
)
def test_a_missing_piece_is_an_error_that_names_artifact_and_remedy(
    tmp_path: Path, artifact: str, key: str
) -> None:
    content = changed(lambda c: c.json[artifact].pop(key))
    with pytest.raises(DataContractError) as caught:
        run_report(tmp_path, content)
    assert f"'{key}' is missing" in str(caught.value)
    assert f"artifact '{artifact}'" in str(caught.value)
    assert "reelflow stage" in str(caught.value)


def test_a_training_curve_without_loss_is_an_error(tmp_path: Path) -> None:
    def drop(content: Content) -> None:
        content.tables["training_curve"] = content.tables["training_curve"].drop_columns("loss")

    with pytest.raises(DataContractError, match="column 'loss' is missing"):
        run_report(tmp_path, changed(drop))


def test_a_run_without_validation_curve_shows_the_loss_alone(tmp_path: Path) -> None:
    def drop(content: Content) -> None:
        curve = content.tables["training_curve"]
        content.tables["training_curve"] = curve.drop_columns("valid_ndcg_at_10")

    html = run_report(tmp_path, changed(drop))
    assert "Training loss" in html
    assert "Validation" not in html


def test_the_alignment_is_drawn_from_the_model_before_to_the_kept_weights(tmp_path: Path) -> None:
    found = collect.read_alignment(build(tmp_path / "aligned")["alignment_curve"], 0)
    reward, judge, ndcg, legality = found.curves
    assert "independent judge" in judge.name
    for curve in found.curves:
        assert list(curve.steps) == [0, 10, 20, 30]
        # Not where the curve is highest.
        assert curve.marked == (20, "kept")
    assert ndcg.floor == (0.05, "no weights are kept below")
    assert reward.floor is judge.floor is legality.floor is None
    html = run_report(tmp_path / "page")
    assert html.count("kept 0.42 at step 20") > 0
    assert "best 0.45" not in html
    assert "The weights after step 20 of 30 are kept" in html
    assert "on 500 validation users they have the highest P-Score" in html
    assert "of all with an NDCG@10 of at least 0.0500" in html
    assert "the table is of 48 others, on whom no aligned weights were chosen" in html
    # The weights that it began with may have been.
    assert "nothing was chosen" not in html


def test_what_the_alignment_gave_has_a_paired_interval(tmp_path: Path) -> None:
    found = collect.read_alignment(build(tmp_path)["alignment_curve"], 0)
    outcomes = {change.difference.metric: change.difference.outcome for change in found.changes}
    assert outcomes == {
        "reward": "beats",
        "judge": "does not beat",
        "ndcg_at_10": "does not beat",
        "legality": "is worse than",
    }
    reward = found.changes[0]
    assert reward.difference.estimate.value == pytest.approx(0.015)
    assert reward.after - reward.before == pytest.approx(0.015)
    # The spread of the users themselves, 0.3, has no part in it.
    assert reward.difference.estimate.low > 0.01


def test_an_alignment_that_kept_nothing_says_so(tmp_path: Path) -> None:
    def none_kept(content: Content) -> None:
        content.json["alignment_curve"]["best_step"] = 0

    def not_done(content: Content) -> None:
        content.json["alignment_curve"] = {"best_step": 0, "steps": 0}
        content.aligned = {}
        content.tables["alignment_curve"] = content.tables["alignment_curve"].slice(0, 0)

    html = run_report(tmp_path / "none", changed(none_kept))
    assert "No weights of 30 steps are kept" in html
    assert "The recommender stays as it was trained" in html
    assert " kept 0.4" not in html
    assert "on whom no aligned weights were chosen" not in html
    assert "the model that was the reward" not in html
    html = run_report(tmp_path / "not done", changed(not_done))
    assert "No preference could be learned from the feedback" in html
    assert collect.ALIGNMENT["judge"] not in html


def test_nulls_of_the_validation_curve_are_left_out_not_drawn_as_zero(tmp_path: Path) -> None:
    loss, valid = collect.read_curves(build(tmp_path)["training_curve"])
    assert (loss.name, valid.name) == ("Training loss", "Validation NDCG@10")
    assert len(loss.steps) == 500
    assert list(valid.steps) == list(range(50, 501, 50))
    assert min(valid.values) > 0
    assert (loss.marked, valid.marked) == (None, (500, "best"))


def test_semantic_id_statistics_are_counted_from_the_codes(tmp_path: Path) -> None:
    def recode(content: Content) -> None:
        content.codes[:] = [0, 0, 0]
        content.codes[:15] = [[i % 4 + 1, i % 5, 7] for i in range(15)]

    inputs = build(tmp_path, changed(recode))
    ids = collect.read_semantic_ids(inputs["semantic_ids"], inputs["catalogue"], inputs["items"], 0)
    assert (ids.items, ids.distinct, ids.colliding_items, ids.largest_bucket) == (60, 16, 45, 45)
    first, _, third = ids.levels
    assert (first.used, third.used) == (5, 2)
    # Third level: 45 items on one code, 15 on another, of 8 codes.
    assert third.entropy_bits == pytest.approx(0.8113, abs=1e-4)
    assert third.max_entropy_bits == 3


def test_the_lineage_joins_each_stage_to_the_digests_it_read(tmp_path: Path) -> None:
    inputs = build(tmp_path)
    records = {r.name: r for r in collect.stage_records(inputs.lineage(), {"split": "Cuts."})}
    assert records["split"].summary == "Cuts."
    assert records["register"].parents == (
        "align_recommender",
        "semantic_ids",
        "evaluate_recommender",
    )
    for record in records.values():
        for artifact in record.inputs:
            written = {a.name: a.digest for a in records[artifact.stage].outputs}
            assert written[artifact.name] == artifact.digest
    assert sum(a.rows or 0 for a in records["split"].outputs) == 100


def split_of(folder: Path, content: Content | None = None, **params: Any) -> Any:
    inputs = build(folder, content, split={"params": params})
    return collect.read_split(inputs["source"], inputs["test_examples"], inputs.lineage())


def test_a_split_that_leaves_the_last_event_out_is_told_without_dates(tmp_path: Path) -> None:
    split = split_of(tmp_path, protocol="auto")
    assert split.protocol == "leave one out"
    assert [(p.name, p.users, p.events) for p in split.periods] == [
        ("train", 45, "all but the last two events: 4,321 events"),
        ("validation", 42, "the event before the last"),
        ("test", 40, "the last event"),
    ]


FIRST_POSITIVE = "the first positive event"


@pytest.mark.parametrize(
    ("own", "params", "words"),
    [
        (
            ("2023-11-10", "2023-11-14"),
            {"protocol": "auto"},
            ("events before 10 November 2023", "10 November 2023 to 13 November 2023"),
        ),
        (
            (None, None),
            {"protocol": "temporal", "valid_from": "2023-11-13", "test_from": "2023-11-14"},
            ("events before 13 November 2023", f"{FIRST_POSITIVE}, 13 November 2023"),
        ),
        (
            (None, None),
            {"protocol": "temporal"},
            ("before the validation period", "between train and test"),
        ),
    ],
)
def test_a_split_by_time_is_told_with_its_days(
    tmp_path: Path,
    own: tuple[str | None, str | None],
    params: dict[str, Any],
    words: tuple[str, str],
) -> None:
    days = dict(zip(("valid_from", "test_from"), own, strict=True))
    content = changed(lambda c: c.json["source"].update(split={"protocol": "temporal"} | days))
    split = split_of(tmp_path, content, **params)
    assert split.protocol == "temporal"
    *earlier, test = (period.events for period in split.periods)
    for told, expected in zip(earlier, words, strict=True):
        assert expected in told
    assert test == f"{FIRST_POSITIVE}, 14 November 2023 to 21 November 2023 (last target)"


def test_the_model_is_told_by_what_it_has(tmp_path: Path) -> None:
    def told(name: str, **changes: Any) -> str:
        content = changed(lambda c: c.model.update(changes))
        return collect.read_recommender(build(tmp_path / name, content)["recommender"])

    whole = told("whole")
    assert "newest 20 events and, as a pathway of its own, the newest 32 positive events" in whole
    assert "writes the 3 codes of the next item, 8 codes a level, and may copy from a mem" in whole
    assert "up to 16 items that followed each of the newest 4 events" in whole
    bare = told("bare", positive_feedback=0, memory={"successors": 0, "events": 4, "window": 3})
    assert "newest 20 events and has no pathway for positive events" in bare
    assert bare.endswith("without a memory of successors.")
    more = told("more", lifelong={"entries": 2000}, static_rows=[3, 5])
    assert more.endswith(
        "Beside them it reads the clusters of the newest 2,000 events and 2 features of the user."
    )


def test_the_report_reads_the_configuration_that_training_writes(tmp_path: Path) -> None:
    from components.training.onerec.config import OneRecConfig

    content = changed(lambda c: c.model.update(OneRecConfig().model_dump(mode="json")))
    assert "newest 20 events" in collect.read_recommender(build(tmp_path, content)["recommender"])


def test_different_environments_are_all_told(tmp_path: Path) -> None:
    inputs = build(tmp_path, ingest={"environment": {"torch": "2.12.0"}, "seed": 4})
    told = dict(collect.environment(inputs.lineage()))
    assert told["torch"] == "2.12.0 and 2.13.0"
    assert told["seed"] == "4 and 0"


def test_params_yaml_brings_back_every_parameter_but_no_credentials(tmp_path: Path) -> None:
    import yaml

    params = {"source": "s3://key:secret@bucket/tables", "seed": 3, "nested": {"a": [1, 2]}}
    content = changed(lambda c: c.json["source"].update(uri="s3://key:secret@bucket/tables"))
    html = run_report(tmp_path, content, ingest={"params": params})
    assert "secret" not in html
    text = collect.params_yaml(build(tmp_path / "b", ingest={"params": params}).lineage())
    sections = yaml.safe_load(text)
    assert sections["ingest"] == params | {"source": "s3://bucket/tables"}
    assert sections["split"]["optimiser"]["learning_rate"] == 0.001


def test_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError):
        ReportParams(example_users=0)
    with pytest.raises(ValueError):
        ReportParams(example_users=21)


def test_planning_the_report_imports_nothing_heavy() -> None:
    import subprocess
    import sys

    code = (
        "import sys, components.evaluation.report.stage\n"
        "print([m for m in ('numpy', 'pyarrow', 'jinja2', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
