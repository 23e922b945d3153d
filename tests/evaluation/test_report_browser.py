"""A real browser shows the page on a phone and on a desk, in light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_run import Content, run_report

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
WIDTHS = [375, 1280]

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    titles = ["w" * 500, "عنوان الفيديو الطويل", "<b>bold</b>", "🎬" * 90, None, "plain"] * 10
    content = Content(titles=titles)
    content.json["source"]["uri"] = "/a/very/long/path" * 12
    content.json["evaluation"]["alarms"] = ["n" * 300]
    page = folder / "report.html"
    page.write_text(run_report(folder, content), encoding="utf-8")
    return page


@pytest.fixture
def opened(browser: Any, file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a window of the width given as parameter, with what went wrong so far."""
    context = browser.new_context(
        viewport={"width": request.param, "height": 800}, color_scheme="dark"
    )
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda m: page.wrong.append(m.text))
    page.on("pageerror", lambda e: page.wrong.append(str(e)))
    page.on("request", lambda r: r.url.startswith("file:") or page.wrong.append(r.url))
    page.goto(file.as_uri())
    yield page
    context.close()


@pytest.mark.parametrize("opened", WIDTHS, indirect=True)
def test_nothing_overflows_nothing_fails_nothing_is_fetched(opened: Any) -> None:
    opened.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    width, window = opened.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= window
    clipped = opened.evaluate(
        """[...document.querySelectorAll("main *, header *")].filter((e) =>
             e.getBoundingClientRect().right > innerWidth + 1
             && !e.closest(".scroll, nav, pre, svg")).map((e) => e.outerHTML.slice(0, 120))"""
    )
    assert clipped == []
    assert opened.wrong == []


@pytest.mark.parametrize("opened", WIDTHS, indirect=True)
def test_text_is_large_enough_to_read(opened: Any) -> None:
    smallest = opened.evaluate(
        """Math.min(...[...document.querySelectorAll("main *")]
             .filter((e) => e.childNodes.length && e.innerText)
             .map((e) => parseFloat(getComputedStyle(e).fontSize)))"""
    )
    assert smallest >= 11


@pytest.mark.parametrize("opened", [1280], indirect=True)
def test_a_click_on_a_column_sorts_and_a_second_click_turns_it_round(opened: Any) -> None:
    table = opened.locator("#stages table")
    head = table.locator("th button", has_text="time")
    values = "(t) => [...t.tBodies[0].rows].map((r) => Number(r.cells[1].dataset.value))"
    head.click()
    down = table.evaluate(values)
    assert down == sorted(down, reverse=True)
    assert down[0] == 43
    head.click()
    assert table.evaluate(values) == sorted(down)


@pytest.mark.parametrize("opened", [1280], indirect=True)
def test_a_stage_in_the_graph_opens_its_record(opened: Any) -> None:
    record = opened.locator("#stage-train_recommender")
    assert record.evaluate("(d) => d.open") is False
    opened.locator('.graph a[href="#stage-train_recommender"]').click()
    opened.wait_for_function("document.querySelector('#stage-train_recommender').open")


def test_without_scripts_the_page_still_says_everything(browser: Any, file: Path) -> None:
    context = browser.new_context(java_script_enabled=False, viewport={"width": 375, "height": 800})
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("time").first.inner_text() == "1 January 2026, 10:10 UTC"
    assert page.locator("button:visible").count() == 0
    assert page.locator("#results .track").count() == 7
    context.close()
