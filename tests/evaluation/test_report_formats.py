"""Numbers, times and texts as a reader meets them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from components.evaluation.report import formats


def plain(text: str) -> str:
    return text.replace(formats.JOIN, " ")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.004, "0.00 s"),
        (9.27, "9.3 s"),
        (59.97, "1 min 00 s"),
        (72, "1 min 12 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_a_duration_reads_as_a_clock(seconds: float, words: str) -> None:
    assert plain(formats.duration(seconds)) == words


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (812, "812 B"), (1020 * 2**20, "0.996 GiB"), (2**41, "2 TiB")],
)
def test_a_size_has_at_most_three_digits(num_bytes: int, words: str) -> None:
    assert plain(formats.size(num_bytes)) == words


@pytest.mark.parametrize(
    ("fraction", "words"),
    [(0, "0 %"), (1e-6, "< 0.1 %"), (0.1234, "12.3 %"), (0.999999, "> 99.9 %"), (1, "100 %")],
)
def test_a_share_never_rounds_something_to_nothing_or_to_all(fraction: float, words: str) -> None:
    assert plain(formats.share(fraction)) == words


def test_a_difference_always_has_its_sign_and_a_true_minus() -> None:
    assert (formats.signed(0.0021), formats.signed(-0.0021)) == ("+0.0021", "−0.0021")
    assert formats.score(float("nan")) == "–"


def test_metric_names_are_the_fields() -> None:
    assert formats.metric_label("ndcg_at_10") == "NDCG@10"
    assert formats.metric_label("watch_at_home") == "watch at home"
    assert (formats.label("onerec"), formats.label("my_model")) == ("OneRec", "my_model")


def test_a_moment_is_told_in_utc() -> None:
    noon = datetime(2026, 3, 5, 12, 7, tzinfo=timezone(timedelta(hours=8)))
    assert formats.moment(noon) == formats.moment(noon.astimezone(UTC)) == "5 March 2026, 04:07 UTC"


@pytest.mark.parametrize("text", ["a", "\u200bé", "🎬", "\u200f(2)", "한", "\u202eevil\u202c"])
def test_text_with_any_letter_is_visible(text: str) -> None:
    assert formats.visible(text)


def test_clipping_keeps_short_text_and_one_line() -> None:
    assert formats.clip("  a\nb\t\x00c\u2028d ", 20) == "a b c d"
    assert len(formats.clip("x" * 900, 50)) == 50


@pytest.mark.parametrize("limit", range(2, 12))
def test_clipping_never_leaves_half_an_emoji_family(limit: int) -> None:
    family = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
    cut = formats.clip("ab" + family + "cd" + family, limit).removesuffix("…")
    assert not cut.endswith("\u200d")
    assert cut.count("\U0001f469") == 2 * cut.count("\U0001f467")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://key:secret@bucket/prefix", "s3://bucket/prefix"),
        ("https://host/a?token=1", "https://host/a"),
        ("/home/me/data", "/home/me/data"),
    ],
)
def test_credentials_never_reach_the_page(uri: str, shown: str) -> None:
    assert formats.without_credentials(uri) == shown
