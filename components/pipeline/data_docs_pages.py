"""Data Docs made readable without a network, and their index.

Great Expectations' pages load style sheets, icons and scripts from content delivery networks; its
index is drawn by such a script and is empty without it. Here scripts and outside links are taken
out of each page, one style sheet is put in, and the index is written anew. Random element ids are
renumbered, so that equal results give equal pages.
"""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_GONE = [
    re.compile(pattern, re.DOTALL | re.IGNORECASE)
    for pattern in (
        r"<script\b.*?</script>",
        r"<link\b[^>]*>",
        r"<img\b[^>]*>",
        r"<footer\b.*?</footer>",
        r"background:\s*url\([^)]*\)[^;]*;",
    )
]
_UUID = re.compile(r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; font: 15px/1.5 system-ui, sans-serif; }
a { color: #2563eb; } h1, h4, h5 { margin: 0; } p { margin: .3rem 0; }
nav.navbar { height: auto !important; position: static; }
ol, ul { list-style: none; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; margin: .8rem 0; padding: .4rem .8rem;
  max-height: none !important; }
.card:has(.btn-group) { display: none; }
.sticky { position: static; } .collapse { display: block; }
.alert { background: var(--soft); border-radius: .4rem; margin: 1.2rem 0 .3rem;
  padding: .4rem .8rem; }
.table-responsive { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .5rem; text-align: left;
  vertical-align: top; }
.badge { background: var(--soft); border-radius: .3rem; padding: 0 .3rem; font-family: monospace; }
i.fas { font-style: normal; }
.fa-check-circle::before { content: "✓"; } .fa-times::before { content: "✗"; }
.fa-exclamation-triangle::before { content: "!"; }
.text-success { color: #15803d; } .text-danger { color: #dc2626; } .text-warning { color: #b45309; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


def make_self_contained(folder: Path) -> None:
    """Rewrite every page below ``folder`` so that it loads nothing."""
    shutil.rmtree(folder / "static", ignore_errors=True)
    for page in sorted(folder.rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        for pattern in _GONE:
            text = pattern.sub("", text)
        for number, found in enumerate(dict.fromkeys(_UUID.findall(text)), 1):
            text = text.replace(found, f"element-{number}")
        text = text.replace("</head>", f"<style>{_STYLE}</style></head>", 1)
        page.write_text(text, encoding="utf-8")


def write_index(folder: Path, tables: Sequence[dict[str, Any]], note: str) -> None:
    """Write ``index.html``: each table's rows, its broken rules, and links to its pages.

    Args:
        folder: the site; pages of a table are found by its name.
        tables: ``table`` and the content of ``TableReport.to_json()`` of each table.
        note: one sentence on who judged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    body = "".join(_table_section(folder, table) for table in tables)
    (folder / "index.html").write_text(
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Data Docs</title><style>{_STYLE}</style></head>"
        f"<body><h1>Data Docs</h1><p>{html.escape(note)}</p>{body}</body></html>",
        encoding="utf-8",
    )


def _table_section(folder: Path, table: dict[str, Any]) -> str:
    name = str(table["table"])
    pages = sorted(
        p.relative_to(folder).as_posix() for p in folder.rglob(f"{name}.html") if p.parent != folder
    )
    links = " · ".join(
        f"<a href='{html.escape(page)}'>{page.split('/', 1)[0]}</a>" for page in pages
    )
    broken = [rule for rule in table["rules"] if rule["broken"]]
    rows = "".join(
        f"<tr><td>{html.escape(rule['rule'])}</td><td>{html.escape(rule['reason'])}</td>"
        f"<td>{rule['severity']}</td><td>{html.escape(rule['allowed'])}</td>"
        f"<td class='number'>{_found(rule)}</td></tr>"
        for rule in broken
    )
    titles = ("rule", "what is wrong", "severity", "allowed", "found")
    head = "<tr>" + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    found = f"<div class='table-responsive'><table>{head}{rows}</table></div>" if broken else ""
    return (
        f"<div class='card'><h4>{html.escape(name)}</h4><p>{links}</p>"
        f"<p>{table['rows_in']:,} rows in, {table['rows_passed']:,} passed, "
        f"{table['rows_quarantined']:,} quarantined; {len(table['rules'])} rules, "
        f"{len(broken)} broken</p>{found}</div>"
    )


def _found(rule: dict[str, Any]) -> str:
    if rule["level"] == "row":
        return f"{rule['broken']:,} of {rule['of']:,} rows"
    return "nothing" if rule["observed"] is None else f"{rule['observed']:.6g}"
