"""Starts ``reelflow ui`` and opens its pages, and the newest report, in Chromium; a script.

Fails if a page asks another host than this machine.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from urllib.parse import urlsplit

from components.pipeline.reports import find_report
from components.pipeline.runner import open_store
from components.pipeline.settings import load_settings

REELFLOW = [sys.executable, "-m", "components.pipeline.cli"]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--no-first-run",
    # What the browser asks of its maker on its own is not what the pages ask; theirs are counted.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost",
]
SETTLE_MS = 4000


def main() -> None:
    report = find_report(open_store(load_settings()), "latest").as_uri()
    ui = subprocess.Popen([*REELFLOW, "ui"], stdout=subprocess.PIPE, text=True)
    try:
        assert ui.stdout is not None
        words: list[str] = []
        for line in ui.stdout:
            words += line.split()
            if "Ctrl-C" in line:
                break
        prefect, mlflow = [word for word in words if word.startswith("http://")]
        open_pages(
            [
                report,
                f"{prefect}/dashboard",
                f"{prefect}/runs",
                f"{prefect}/deployments",
                f"{mlflow}/",
                f"{mlflow}/#/models",
            ]
        )
    finally:
        ui.send_signal(signal.SIGINT)
        ui.wait(60)


def open_pages(addresses: list[str]) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        print("no chromium on this machine: the pages were not opened", file=sys.stderr)
        return
    from playwright.sync_api import sync_playwright

    asked: set[str] = set()
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname or ""))
        for address in addresses:
            page.goto(address)
            page.wait_for_timeout(SETTLE_MS)
        browser.close()
    elsewhere = asked - {"", "127.0.0.1", "localhost"}
    assert not elsewhere, elsewhere


if __name__ == "__main__":
    main()
