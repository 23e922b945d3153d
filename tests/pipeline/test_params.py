"""Parameters: which layer wins, and what a user is told of a value that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tiny_stages import NumbersParams, Tiny

from components.pipeline import params as params_module
from components.pipeline.errors import ParamsError
from components.pipeline.params import load_params, parameter_paths, read_yaml
from components.pipeline.stage import REGISTRY, Stage, load_registry


@pytest.fixture
def load(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call with the text of params.yaml, of profiles by name, and overrides."""
    profiles = tmp_path / "profiles"
    profiles.mkdir()
    monkeypatch.setattr(params_module, "PROFILES", profiles)

    def call(text: str = "", *overrides: str, profile: str | None = None, **files: str) -> Any:
        (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
        for name, content in files.items():
            (profiles / f"{name}.yaml").write_text(content)
        return load_params(
            REGISTRY, file=tmp_path / "params.yaml", profile=profile, overrides=overrides
        )

    return call


def failure(load: Any, *arguments: Any, **named: Any) -> ParamsError:
    with pytest.raises(ParamsError) as caught:
        load(*arguments, **named)
    assert caught.value.exit_code == 2
    return caught.value


# Precedence


def test_defaults_hold_where_nothing_is_said(load: Any) -> None:
    assert load()["numbers"] == NumbersParams()


def test_a_profile_wins_over_the_file_and_set_wins_over_both(load: Any) -> None:
    text = "numbers: {count: 10, attempt: 1}\ndoubled: {factor: 3}"
    assert load(text)["numbers"].count == 10
    big = "numbers: {count: 20}"
    found = load(text, profile="big", big=big)
    assert (found["numbers"].count, found["numbers"].attempt, found["doubled"].factor) == (20, 1, 3)
    assert load(text, "numbers.count=30", profile="big", big=big)["numbers"].count == 30
    assert load(text, "numbers.count=30", "numbers.count=31")["numbers"].count == 31


def test_nested_keys_are_merged_not_replaced(load: Any) -> None:
    text = "doubled: {factor: 3, rounding: {digits: 5}}"
    assert load(text, "doubled.rounding.digits=7")["doubled"].rounding.digits == 7
    assert load(text, "doubled.factor=4")["doubled"].rounding.digits == 5


def test_a_section_with_all_lines_commented_out_takes_nothing_back(load: Any) -> None:
    text = "numbers: {count: 10}\ntotal:\n  # label: x\n"
    found = load(text, profile="empty", empty="numbers:\n  # count: 1\n")
    assert found["numbers"].count == 10
    assert found["total"].label == "sum"


def test_a_profile_may_be_a_file_of_the_user(load: Any, tmp_path: Path) -> None:
    mine = tmp_path / "my size.yaml"
    mine.write_text("numbers: {count: 7}")
    assert load("", profile=str(mine))["numbers"].count == 7


def test_params_of_the_current_folder_come_before_those_of_the_project(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "params.yaml").write_text("numbers: {count: 9}")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "params.yaml").write_text("numbers: {count: 8}")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(params_module, "ROOT", tmp_path / "project")
    monkeypatch.chdir(tmp_path)
    assert load_params(REGISTRY)["numbers"].count == 9  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_params(REGISTRY)["numbers"].count == 8  # type: ignore[attr-defined]


# Seed


def test_the_seed_reaches_every_stage_that_has_one(load: Any) -> None:
    found = load("seed: 17")
    assert found["numbers"].seed == 17
    assert not hasattr(found["doubled"], "seed")
    assert load("seed: 17", "seed=18")["numbers"].seed == 18


def test_a_stage_may_have_a_seed_of_its_own(load: Any) -> None:
    assert load("seed: 17\nnumbers: {seed: 3}")["numbers"].seed == 3


@pytest.mark.parametrize("value", ["-1", "2147483648", "1.5", "true", "'1'", "[1]"])
def test_a_seed_that_cannot_be_is_named(load: Any, value: str) -> None:
    error = failure(load, f"seed: {value}")
    assert error.where == "params.yaml seed"
    assert "0 to 2147483647" in str(error)


# What is wrong, where, and what is allowed


def test_an_unknown_section_gets_a_suggestion(load: Any) -> None:
    error = failure(load, "nubmers: {count: 1}")
    assert error.where == "params.yaml nubmers"
    assert "did you mean 'numbers'?" in str(error)
    assert "doubled" in str(error)


def test_an_unknown_key_gets_a_suggestion_and_its_place(load: Any) -> None:
    error = failure(load, "", "numbers.cuont=3")
    assert error.where == "--set numbers.cuont"
    assert "did you mean 'count'?" in str(error)
    error = failure(load, "doubled: {rounding: {digts: 1}}")
    assert error.where == "params.yaml doubled.rounding.digts"
    assert "did you mean 'digits'?" in str(error)


def test_a_parameter_named_by_a_part_of_its_path_is_pointed_to(load: Any) -> None:
    error = failure(load, "", "doubled.digits=3")
    assert error.where == "--set doubled.digits"
    assert error.remedy == "did you mean 'doubled.rounding.digits'?"


@pytest.mark.parametrize(
    ("text", "path", "value", "allowed"),
    [
        ("numbers: {count: 0}", "numbers.count", "0", "≥ 1 and ≤ 1000"),
        ("numbers: {count: 1001}", "numbers.count", "1001", "≥ 1 and ≤ 1000"),
        ("doubled: {factor: 0.0}", "doubled.factor", "0.0", "> 0"),
        ("doubled: {rounding: {digits: 10}}", "doubled.rounding.digits", "10", "≥ 0 and < 10"),
        ("numbers: {count: many}", "numbers.count", "'many'", "≥ 1 and ≤ 1000"),
        ("numbers: {count: 1.5}", "numbers.count", "1.5", "≥ 1 and ≤ 1000"),
        ("numbers: {count: null}", "numbers.count", "None", "≥ 1 and ≤ 1000"),
    ],
)
def test_a_value_out_of_range_or_of_a_wrong_type_is_named_with_what_is_allowed(
    load: Any, text: str, path: str, value: str, allowed: str
) -> None:
    error = failure(load, text)
    assert error.where == f"params.yaml {path}"
    assert f"got {value}:" in str(error)
    assert f"allowed: {allowed}" in str(error)
    assert "default" in str(error)


def test_the_layer_that_says_the_bad_value_is_named(load: Any) -> None:
    bad = "numbers: {count: 0}"
    assert failure(load, "numbers: {count: 5}", profile="bad", bad=bad).where == (
        "profile bad numbers.count"
    )
    assert failure(load, bad, "numbers.count=-1").where == "--set numbers.count"


@pytest.mark.parametrize(
    "value", ["true", "1_000", "'5'", "5 px", ".inf", "-.inf", ".nan", "1" * 35]
)
@pytest.mark.parametrize("path", ["numbers.count", "doubled.factor", "doubled.rounding.digits"])
def test_what_is_no_moderate_number_is_none(load: Any, path: str, value: str) -> None:
    error = failure(load, "", f"{path}={value}")
    assert error.where == f"--set {path}"
    assert ("a number" if path == "doubled.factor" else "an integer") in str(error)
    assert "allowed: " in str(error.remedy)


def test_a_whole_number_may_be_written_with_an_exponent(load: Any) -> None:
    assert load("", "numbers.count=1e3")["numbers"].count == 1000


@pytest.mark.parametrize("text", ["numbers: 5", "numbers: [1]", "numbers: false", "numbers: ''"])
def test_a_section_that_is_no_section_is_an_error(load: Any, text: str) -> None:
    error = failure(load, text)
    assert error.where == "params.yaml numbers"
    assert "section" in str(error)


def test_a_rule_between_fields_is_told_in_its_own_words(load: Any, tmp_path: Path) -> None:
    class Range(BaseModel):
        model_config = ConfigDict(extra="forbid")
        low: int = Field(0, description="begin")
        high: int = Field(1, le=9, description="end")
        step: int = Field(1, description="stride")

        @model_validator(mode="after")
        def ordered(self) -> Range:
            if self.low > self.high:
                raise ValueError("low must not be above high")
            return self

    class Ranges(BaseModel):
        first: Range = Range()

    remedy = "low is: begin; default 0 | high is: end; allowed: ≤ 9; default 1"
    for kind, text, where in ((Range, "{low: 5}", "r"), (Ranges, "{first: {low: 5}}", "r.first")):
        registry = {"r": Stage("r", lambda *a: {}, (), ("o",), kind, "m", None)}
        (tmp_path / "p.yaml").write_text(f"r: {text}")
        with pytest.raises(ParamsError) as caught:
            load_params(registry, file=tmp_path / "p.yaml")
        assert caught.value.where == f"p.yaml {where}"
        assert caught.value.remedy == remedy
        assert str(caught.value).startswith(f"p.yaml {where}: low must not be above high")


def test_a_section_in_place_of_which_a_value_stands_is_told_of_its_parameters(load: Any) -> None:
    error = failure(load, "doubled: {rounding: 5}")
    assert str(error.remedy).endswith("give a section of key: value lines: digits")


# YAML


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: [1, 2\nc: 3", 3),
        ("a: 1\n\tb: 2", 2),
        ("seed: 1\nnumbers:\n  count: 1\n  count: 2", 4),
        ("numbers: {count: 1}\nseed: 1\nnumbers: {count: 2}", 3),
        ("a: !!python/object/apply:os.system ['true']", 1),
    ],
)
def test_bad_yaml_is_named_with_its_line(load: Any, tmp_path: Path, text: str, line: int) -> None:
    error = failure(load, text)
    assert str(error.where).startswith(f"{tmp_path / 'params.yaml'} line {line} column ")


@pytest.mark.parametrize("text", ["[" * 3000, "{a: " * 3000, "seed: " + "1" * 5000])
def test_yaml_beyond_what_python_can_hold_is_named(load: Any, tmp_path: Path, text: str) -> None:
    error = failure(load, text)
    assert error.where == str(tmp_path / "params.yaml")
    assert error.remedy
    assert failure(load, "", f"numbers.count={text}").where == "--set numbers.count"


def test_a_file_that_cannot_be_read_is_named(load: Any, tmp_path: Path, tiny: Tiny) -> None:
    with pytest.raises(ParamsError, match="no such file"):
        load_params(REGISTRY, file=tmp_path / "none.yaml")
    with pytest.raises(ParamsError, match="cannot be read"):
        load_params(REGISTRY, file=tmp_path)
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ParamsError, match="UTF-8"):
        load_params(REGISTRY, file=tmp_path / "latin.yaml")
    assert "sections" in str(failure(load, "- a\n- b"))


def test_scalars_mean_what_a_scientist_expects(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "a: 1e-3\nb: 3E5\nc: 2024-05-01\nd: yes\ne: true\nf: ~\ng:\nh: -7\ni: 1.5\nj: .5\n"
        "k: 12:30\nl: '5'\nm: -.inf\nn: é\no: 007\np: [1, 2e1]\n"
    )
    content = read_yaml(file)
    assert content == {
        "a": 1e-3,
        "b": 3e5,
        "c": "2024-05-01",
        "d": "yes",
        "e": True,
        "f": None,
        "g": None,
        "h": -7,
        "i": 1.5,
        "j": 0.5,
        "k": "12:30",
        "l": "5",
        "m": float("-inf"),
        "n": "é",
        "o": "007",
        "p": [1, 20.0],
    }
    assert [type(content[key]) for key in "abh"] == [float, float, int]


def test_what_pyyaml_writes_is_read_back(tmp_path: Path) -> None:
    values = {"a": 1, "b": 1e-9, "d": "yes", "e": None, "f": ["2024-05-01", ""]}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(values))
    assert read_yaml(tmp_path / "s.yaml") == values


# --set


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x", "x"),
        ("", ""),
        ("a=b", "a=b"),
        ("s3://bucket/a b", "s3://bucket/a b"),
        ("/data/set #2", "/data/set #2"),
        ("key: value", "key: value"),
        ("- x", "- x"),
        ("'5'", "5"),
        ('"/data: #1"', "/data: #1"),
        ("[unclosed", "[unclosed"),
        ("影片", "影片"),
    ],
)
def test_text_given_by_set_is_taken_as_it_stands(load: Any, text: str, expected: str) -> None:
    assert load("", f"total.label={text}")["total"].label == expected


def test_set_reads_numbers_and_collections(load: Any) -> None:
    assert load("", "doubled.factor=1e-3")["doubled"].factor == 1e-3
    assert load("", "doubled.rounding={digits: 4}")["doubled"].rounding.digits == 4


@pytest.mark.parametrize("text", ["numbers.count", "=3", "numbers.=3", ".count=3", "numbers..a=3"])
def test_a_set_that_cannot_be_read_shows_the_syntax(load: Any, text: str) -> None:
    error = failure(load, "", text)
    assert "write stage.key=value" in str(error)
    assert text in str(error)


def test_sets_of_one_section_are_merged_in_either_order(load: Any) -> None:
    whole, part = "doubled={factor: 3.0}", "doubled.rounding.digits=4"
    for order in ((whole, part), (part, whole)):
        doubled = load("", *order)["doubled"]
        assert (doubled.factor, doubled.rounding.digits) == (3.0, 4)
    error = failure(load, "", part, "doubled.rounding=5")
    assert "sets a value over its parts" in str(error)


def test_a_set_below_a_value_that_was_set_is_an_error(load: Any) -> None:
    assert "before" in str(failure(load, "", "numbers.count=3", "numbers.count.x=1"))


def test_a_missing_profile_gets_a_suggestion(load: Any) -> None:
    error = failure(load, "", profile="lptop", laptop="", h200="")
    assert error.where == "--profile"
    assert "did you mean 'laptop'?" in str(error)
    assert "h200" in str(error)


# The real stages


def numeric_fields(model: type[BaseModel], path: str) -> list[tuple[str, bool]]:
    """Paths of the numbers below a model, and whether each is a list of them."""
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += numeric_fields(kind, f"{path}.{name}")
            continue
        schema = json.dumps(model.model_json_schema()["properties"][name])
        if '"integer"' in schema or '"number"' in schema:
            found.append((f"{path}.{name}", '"array"' in schema))
    return found


REAL = dict(load_registry())
NUMBERS = [
    (stage.name, *field)
    for stage in REAL.values()
    for field in numeric_fields(stage.params, stage.name)
]


@pytest.mark.parametrize(
    ("stage", "path", "listed"),
    [pytest.param(*number, id=number[1]) for number in NUMBERS],
)
def test_every_number_of_every_stage_refuses_what_arrays_cannot_hold(
    tmp_path: Path, stage: str, path: str, listed: bool
) -> None:
    (tmp_path / "params.yaml").write_text("")
    for value in (".inf", "-.inf", ".nan", "9" * 35, "-" + "9" * 35, "1e308", "true", "'7'"):
        given = f"{path}=[{value}]" if listed else f"{path}={value}"
        with pytest.raises(ParamsError) as caught:
            load_params({stage: REAL[stage]}, file=tmp_path / "params.yaml", overrides=[given])
        assert caught.value.where == f"--set {path}"
        assert caught.value.remedy


@pytest.mark.parametrize("path", [path for _, path, _ in NUMBERS if path.endswith(".seed")])
def test_every_seed_goes_as_far_as_the_common_one(tmp_path: Path, path: str) -> None:
    (tmp_path / "params.yaml").write_text("")
    load_params(REAL, file=tmp_path / "params.yaml", overrides=[f"{path}=2147483647"])
    with pytest.raises(ParamsError, match="2147483647"):
        load_params(REAL, file=tmp_path / "params.yaml", overrides=[f"{path}=2147483648"])


@pytest.mark.parametrize("day", ["9999-12-31", "0001-01-01"])
def test_a_simulated_log_lies_in_years_that_dates_have(tmp_path: Path, day: str) -> None:
    (tmp_path / "params.yaml").write_text("")
    with pytest.raises(ParamsError, match="1995-01-01"):
        load_params(
            REAL,
            file=tmp_path / "params.yaml",
            overrides=[f"ingest.simulator.start_date={day}"],
        )


def test_every_parameter_has_a_path(tiny: Tiny) -> None:
    assert parameter_paths(REGISTRY) == [
        "numbers.count",
        "numbers.attempt",
        "numbers.seed",
        "doubled.factor",
        "doubled.rounding.digits",
        "total.label",
    ]
