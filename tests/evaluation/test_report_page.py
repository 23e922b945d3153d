"""The page is one file that is complete, safe, light and readable by everyone."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from report_run import Content, changed, run_report

VOID = {"meta", "link", "br", "img"}
HOSTILE = [
    "<script>document.title='owned'</script>",
    "</title></style></script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "{{ 7 * 7 }} {% raw %}",
    "emoji 👩‍👩‍👧 🏳️‍🌈 🎬",
    "عنوان الفيديو ‏(2)‏",
    "a\u202eevil\u202c\x00\x07 end",
    "w" * 500,
    "&amp; <b>bold</b>",
    "",
    "   ",
    "\u200b\u2060",
    None,
]


class Document(HTMLParser):
    """Elements of a page, with a check that every element is closed where it must be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.stack):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def text_of(html: str) -> str:
    """What a reader reads, on one line."""
    return " ".join("".join(Document(html).text).split())


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return run_report(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    titles = (HOSTILE * 5)[:60]
    content = Content(titles=titles)
    bad = HOSTILE[1]
    content.json["registration"]["reason"] = bad
    content.json["evaluation"]["alarms"] = [bad]
    content.json["evaluation"]["methods"][bad] = content.json["evaluation"]["methods"]["bigram"]
    content.json["source"] |= {"citation": bad, "licence": bad, "uri": bad, "notes": [bad]}
    content.json["source"]["ground_truth"] = {bad: bad}
    content.json["data_health"]["tables"]["interactions"]["rules"][0]["reason"] = bad
    return run_report(
        tmp_path_factory.mktemp("hostile"), content, train_sasrec={"params": {bad: bad}}
    )


def test_the_page_loads_nothing(html: str) -> None:
    document = Document(html)
    for tag, attributes in document.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "data", "action", "xlink:href"):
                assert value is not None
                assert value.startswith("#") or value == "data:,", f"<{tag} {name}={value}>"
    assert not re.search(r"https?:|//[a-z]|@import|url\(", html.replace("</", ""))


def test_the_policy_allows_this_script_and_no_other(html: str) -> None:
    policy = next(
        m["content"] for m in Document(html).all("meta") if m.get("http-equiv") is not None
    )
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy is not None
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(hostile: str) -> None:
    document = Document(hostile)
    assert len(document.all("script")) == 1
    assert document.all("img") == []
    for tag, attributes in document.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
    shown = "".join(document.text)
    assert "<script>document.title='owned'</script>" in shown
    assert "{{ 7 * 7 }} {% raw %}" in shown
    assert "👩‍👩‍👧 🏳️‍🌈 🎬" in shown
    assert "عنوان الفيديو" in shown
    assert "\x00" not in hostile
    assert "\x07" not in hostile


def test_titles_are_isolated_from_the_direction_of_their_neighbours(hostile: str) -> None:
    for title in ("عنوان", "\u202eevil"):
        at = [m.start() for m in re.finditer(title, hostile)]
        assert at
        for position in at:
            assert re.search(r"<bdi[^<]*$", hostile[:position])


def test_a_long_title_is_cut_and_an_empty_one_gives_way_to_id_and_tags(hostile: str) -> None:
    assert "w" * 141 not in hostile
    assert "w" * 139 + "…" in hostile
    assert re.search(r'item \d+</span> · <bdi class="tags">\w+', hostile)


def test_the_largest_page_stays_below_half_a_megabyte(tmp_path: Path) -> None:
    content = Content(items=400, titles=['"<🎬>' * 200] * 400)
    content.json["semantic_ids"]["codebook_size"] = 8192
    content.json["evaluation"]["alarms"] = ["long alarm"] * 5
    assert len(run_report(tmp_path, content).encode()) < 500_000


def test_everything_a_reader_looks_for_is_there(html: str) -> None:
    shown = text_of(html)
    for words in (
        "recommender-simulator version 3 beats version 2",
        "NDCG@10 is 0.0430 against 0.0399 of version 2, for the same 40 users: a paired "
        "difference of +0.0031 (95 % interval +0.0012 to +0.0050).",
        "OneRec beats Last-item bigram on NDCG@10. OneRec does not beat SASRec on NDCG@10: the "
        "interval includes 0. OneRec is worse than Popularity on NDCG@10.",
        "Every list ranks the full catalogue. A hit is the very item, not its semantic id.",
        "Items of a user’s history are not masked; the masked variant stands below.",
        "Collision rate: 0 % of the items share their semantic id with another item; it was "
        "20.0 % before items were told apart.",
        "60 items have 60 different ids; no two items share one. As clustered, 12 items (20.0 %) "
        "shared theirs, at most 4 on one; to tell them apart, 8 items got the nearest free last "
        "code instead of their own.",
        "The target is the last event of the user; a hit is a target in the recommended list.",
        "marks positive events",
        "An encoder (layers: 2, width: 64) reads the newest 20 events",
        "Of 2 settings one was chosen: learning rate 0.005, dropout 0.2, tied yes. Its NDCG@10 on "
        "validation was best after epoch 7 of 9: 0.0420. The search ran to its end.",
        "train45all but the last two events: 4,321 events",
        "watch_time_s is negative",
        '{"user_id": 1, "watch_time_s": -3}',
        "train_recommender 43.0 s",
        "1 min 13 s",
        "2.58 of 3.00 bits",
        "The first 10 of a random sample (seed 0) of 40 test users",
        "timestamps were derived from the order of rows",
        "reelflow run recommend --params params.yaml",
        "learning_rate: 0.001",
        "optimiser.learning_rate",
        "Great Expectations 1.24.1",
    ):
        assert words in shown, words


def test_no_event_is_said_to_be_more_than_the_data_says(html: str, tmp_path: Path) -> None:
    def reviews(content: Content) -> None:
        catalogue = content.tables["catalogue"]
        every = catalogue.column("train_count")
        content.tables["catalogue"] = catalogue.drop_columns("train_positive_count").append_column(
            "train_positive_count", every
        )
        content.json["source"]["split"] = {"protocol": "temporal"}

    other = run_report(tmp_path, changed(reviews))
    assert 'class="heart"' in html
    assert "♥" not in other
    assert "positive events" not in text_of(other).split("Example users")[-1].split("Training")[0]
    assert "The target is the first positive event of the test period;" in text_of(other)
    for page in (html, other):
        users = page[page.index('id="users"') : page.index('id="training"')]
        assert not re.search(r"watched|liked|bought", users)


def test_the_cost_of_stages_is_not_called_that_of_one_run(html: str) -> None:
    shown = text_of(html)
    assert "time of all stages1 min 13 ssummed;" in shown
    assert "What it took to make the result of each stage" in shown
    assert "the sum is not the duration of one run" in shown
    assert not re.search(r"this run|What ran", shown.replace("params.yaml of this run", ""))


def test_a_search_that_was_cut_short_is_said_to_be(tmp_path: Path) -> None:
    content = changed(lambda c: c.json["sasrec"].update(cut_short=True))
    assert "The search was cut short by its time limit" in text_of(run_report(tmp_path, content))


def test_times_have_iso_text_in_the_hover(html: str) -> None:
    times = Document(html).all("time")
    assert len(times) >= 10
    for time in times:
        assert time["datetime"] == time["title"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00", time["title"] or "")


def test_headings_never_skip_a_level_and_there_is_one_first(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Document(html).elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_tables_charts_and_scrolling_boxes_have_names(html: str) -> None:
    document = Document(html)
    captioned = [a for a in document.all("table") if a.get("class") != "plain"]
    assert len(captioned) == len(document.all("caption")) >= 5
    for attributes in document.all("svg"):
        named = attributes.get("aria-label") or attributes.get("aria-hidden")
        assert named or "viewbox" in attributes  # the line inside a named chart
    for attributes in document.all("div"):
        if "scroll" in (attributes.get("class") or "").split():
            assert attributes.get("tabindex") == "0"
            assert attributes.get("aria-label")


def test_ids_are_unique_and_links_inside_the_page_lead_somewhere(html: str) -> None:
    document = Document(html)
    ids = [a["id"] for _, a in document.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for link in document.all("a"):
        assert (link["href"] or "").removeprefix("#") in ids


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_has_the_contrast_that_wcag_asks_for(html: str, scheme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", html, re.DOTALL)[scheme]
    colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    pairs = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("paper", "panel")]
    pairs += [("accent", "tint"), ("soft", "tint"), ("ink", "good-tint"), ("soft", "good-tint")]
    pairs += [("ink", "warn-tint"), *((n, f"{n}-tint") for n in ("good", "bad", "warn"))]
    for text, ground in pairs:
        high, low = sorted((luminance(colour[text]), luminance(colour[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)
    for ground in ("paper",):
        high, low = sorted((luminance(colour["mark"]), luminance(colour[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3, "marks of charts"


def test_a_run_without_broken_rules_says_so(tmp_path: Path) -> None:
    def heal(content: Content) -> None:
        for table in content.json["data_health"]["tables"].values():
            for rule in table["rules"]:
                rule["broken"] = 0
        content.tables["quarantine"] = content.tables["quarantine"].slice(0, 0)

    html = run_report(tmp_path, changed(heal))
    assert "all were kept" in html
    assert "Examples of quarantined rows" not in html
