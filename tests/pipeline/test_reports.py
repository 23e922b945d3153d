"""The report of a run is found by `latest` or by the start of its key."""

from __future__ import annotations

from pathlib import Path

import pytest
from published import publish, settings_in

from components.pipeline.errors import CorruptArtifactError, UsageError
from components.pipeline.manifest import Manifest, Store
from components.pipeline.reports import LISTED, find_report
from components.pipeline.runner import open_store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(settings_in(tmp_path))


def report(store: Store, key: str, days_old: float = 0) -> Manifest:
    return publish(store, "report", key, days_old=days_old, file="report.html")


def test_latest_is_the_newest_whatever_the_order_of_keys(store: Store) -> None:
    report(store, "aaa", days_old=2)
    report(store, "bbb", days_old=1)
    report(store, "ccc", days_old=3)
    assert find_report(store, "latest").read_text() == "bbb"


def test_the_start_of_a_key_suffices_if_only_one_begins_so(store: Store) -> None:
    report(store, "abc1")
    report(store, "abd2")
    assert find_report(store, "abd").read_text() == "abd2"
    assert find_report(store, "abc1").read_text() == "abc1"


def test_an_ambiguous_start_lists_what_it_may_mean(store: Store) -> None:
    for key in ("abc1", "abc2", "xyz"):
        report(store, key)
    with pytest.raises(UsageError, match="2 reports begin with 'abc'") as caught:
        find_report(store, "abc")
    assert "abc1" in str(caught.value)
    assert "abc2" in str(caught.value)
    assert "xyz" not in str(caught.value)


def test_an_unknown_key_lists_the_newest_reports(store: Store) -> None:
    for number in range(LISTED + 3):
        report(store, f"key{number:02}", days_old=number)
    with pytest.raises(UsageError, match="no report begins with 'nope'") as caught:
        find_report(store, "nope")
    assert "key00" in str(caught.value)
    assert "and 3 older ones" in str(caught.value)


def test_a_store_without_reports_says_how_to_make_one(store: Store) -> None:
    with pytest.raises(UsageError, match="reelflow run recommend"):
        find_report(store, "latest")


def test_an_altered_report_is_not_shown(store: Store) -> None:
    report(store, "abc")
    page = find_report(store, "latest")
    page.chmod(0o644)
    page.write_text("altered")
    with pytest.raises(CorruptArtifactError, match="altered"):
        find_report(store, "latest")
