"""The rules on the values of each contract table, declared once.

Great Expectations judges them and Data Docs show them (``components.pipeline.data_docs``); the
same declarations compile to the masks that send rows to quarantine
(``components.pipeline.validation``). Types, names and nullability are the contract's affair
(``components.data.contracts``); a rule says which *values* make sense.

Row rules are written to hold for any source: a row that breaks one cannot be learnt from. Table
rules catch what no single row shows: a wrong unit, a truncated export, a join that lost its
other half.
"""

from __future__ import annotations

import datetime
from typing import Literal

from components.data.contracts import INTERACTIONS
from components.pipeline.derived_columns import (
    AnyText,
    BlankElements,
    Contradicts,
    HoursAfter,
    KnownIn,
    LongestText,
    Midnight,
    NumberIfAny,
    Ratio,
    SeenBefore,
    Unreadable,
)
from components.pipeline.rules import FINITE, Parameter, Rule, Suite

#: MovieLens starts in 1995, Amazon reviews in 1996; before lies only what was misread.
EARLIEST = datetime.datetime(1995, 1, 1, tzinfo=datetime.UTC)

#: Watching a video more than this many times in one view is a counter that ran on.
MAX_WATCHED_TIMES = 60

#: Of all views on average. Videos that loop are watched a few times by some and left by most
#: (KuaiRand-Pure: 0.34 on average; with the two columns exchanged 11).
LIKELY_EXCHANGED = 2

#: A day begins between 14 hours before and 12 hours after it does in UTC, lasts 24 hours, and logs
#: may file what happens near midnight under the next or the last day.
HOURS_OF_A_DATE = (-24, 48)
#: All times of day in one zone span 24 hours, some more near midnight; two zones span more.
HOURS_OF_ONE_ZONE = 30

#: Shares from which on a column is likelier broken than unusual.
MOSTLY = 0.9
#: Of all events those that contradict an earlier one. Published logs have up to a few in 10,000
#: (KuaiRand-Pure: 56 of 228,329); a table that was joined with another version of itself has half.
CONTRADICTED = 0.2
#: Years of a user.
OLDEST = 130
#: Of all events one user, or one item.
DOMINANT_USER, DOMINANT_ITEM = 0.2, 0.5
LONGEST_TEXT = 100_000

TEXTS = ("title", "caption", "tags")

#: Signals that are rare on every platform.
RARE = ("like", "follow", "forward", "comment", "profile_enter", "dislike")
OPTIONAL = ("watch_time_s", "duration_s", "click", "long_view", *RARE, "rating")

#: Above this mean, seconds of a *short* video were most likely milliseconds.
LIKELY_MILLISECONDS_S = 4 * 3600


def latest_timestamp(now: datetime.datetime) -> datetime.datetime:
    """End of tomorrow (UTC): clocks of clients and time zones may run ahead by a day.

    A source of impossible times alone may say that it is 1970: the range is never empty.
    """
    today = max(now.astimezone(datetime.UTC), EARLIEST).date()
    return datetime.datetime.combine(
        today + datetime.timedelta(days=2), datetime.time(), datetime.UTC
    )


def _not_null(column: str) -> Rule:
    return Rule(
        f"{column}_missing",
        column,
        "ExpectColumnValuesToNotBeNull",
        {},
        f"{column} is missing",
    )


def _not_negative(column: str) -> Rule:
    return Rule(
        f"{column}_negative",
        column,
        "ExpectColumnValuesToBeBetween",
        {"min_value": 0},
        f"{column} is negative",
    )


def _between(
    name: str, column: str, low: float | None, high: float, reason: str, *, strict: bool = False
) -> Rule:
    kwargs: dict[str, float | bool] = {"max_value": high}
    if low is not None:
        kwargs["min_value"] = low
    if strict:
        kwargs["strict_min"] = True
    return Rule(name, column, "ExpectColumnValuesToBeBetween", kwargs, reason)


def _moment(name: str, column: str, reason: str) -> Rule:
    kwargs = {"min_value": EARLIEST, "max_value": Parameter("latest"), "strict_max": True}
    return Rule(name, column, "ExpectColumnValuesToBeBetween", kwargs, reason)


def _must_be(name: str, column: str, value: bool, reason: str) -> Rule:
    return Rule(name, column, "ExpectColumnValuesToBeInSet", {"value_set": [value]}, reason)


_DURATION = _between(
    "duration_s_not_positive",
    "duration_s",
    0,
    FINITE,
    "duration_s is zero, negative or not a finite number (leave unknown durations null)",
    strict=True,
)


def _at_least(
    name: str,
    column: str,
    low: float,
    reason: str,
    remedy: str,
    severity: Literal["critical", "warning"] = "critical",
) -> Rule:
    return Rule(
        name,
        column,
        "ExpectColumnValuesToBeBetween",
        {"min_value": low},
        reason,
        severity,
        remedy,
    )


def _at_most(
    name: str,
    column: str,
    high: float | Parameter,
    reason: str,
    remedy: str,
    severity: Literal["critical", "warning"] = "critical",
) -> Rule:
    return Rule(
        name,
        column,
        "ExpectColumnValuesToBeBetween",
        {"max_value": high},
        reason,
        severity,
        remedy,
    )


def _mostly_missing(column: str) -> Rule:
    return _at_most(
        f"{column}_mostly_missing",
        f"missing_share_of_{column}",
        MOSTLY,
        f"{column} has a value in fewer than one of ten rows: it may have been lost",
        f"check how {column} is written, or leave the column out",
        "warning",
    )


def _always(column: str) -> Rule:
    return _at_most(
        f"{column}_nearly_always",
        f"typical_{column}",
        MOSTLY,
        f"{column} is true in more than nine of ten rows",
        f"check which column was read as {column}",
        "warning",
    )


_NOT_EMPTY = _at_least(
    "table_empty", "rows", 1, "the table has no rows", "check the file or the query behind it"
)
_SOME_PASS = _at_least(
    "nothing_passes",
    "rows_passed",
    1,
    "no row passes the row rules",
    "check units, identifiers and time zone of the source",
)
_QUARANTINE = _at_most(
    "quarantine_too_large",
    "quarantined_share",
    Parameter("max_quarantine_share"),
    "too large a share of the rows breaks a row rule",
    "correct the source, or accept the loss with --set validate.max_quarantine_share=SHARE",
)

#: What tells one event from another.
EVENT = ("user_id", "item_id", "timestamp")
INTERACTION_SUITE = Suite(
    table="interactions",
    derived={
        "watched_times": Ratio("watch_time_s", "duration_s"),
        "date_midnight": Midnight("date"),
        "repeats_an_earlier_row": SeenBefore(tuple(INTERACTIONS.schema.names), EVENT),
        "contradicts_an_earlier_row": Contradicts(EVENT, tuple(INTERACTIONS.schema.names)),
        "item_is_known": KnownIn("item_id", "items"),
        "user_is_known": KnownIn("user_id", "users"),
        "hours_after_date": HoursAfter("timestamp", "date"),
    },
    spans=("user_id", "item_id", "timestamp", "hours_after_date", "watch_time_s"),
    means=(*OPTIONAL, "watched_times"),
    shares=("user_id", "item_id"),
    gaps=("timestamp",),
    row_rules=(
        _not_null("user_id"),
        _not_null("item_id"),
        _not_null("timestamp"),
        _not_negative("user_id"),
        _not_negative("item_id"),
        _moment(
            "timestamp_out_of_range",
            "timestamp",
            "timestamp lies before 1995 or after tomorrow (seconds read as milliseconds fall in "
            "1970)",
        ),
        _moment("date_out_of_range", "date_midnight", "date lies before 1995 or after tomorrow"),
        _between(
            "date_disagrees",
            "hours_after_date",
            *HOURS_OF_A_DATE,
            "timestamp lies more than a day away from date",
        ),
        _between(
            "watch_time_s_negative",
            "watch_time_s",
            0,
            FINITE,
            "watch_time_s is negative or not a finite number",
        ),
        _DURATION,
        _between(
            "watched_too_often",
            "watched_times",
            None,
            MAX_WATCHED_TIMES,
            f"watch_time_s is more than {MAX_WATCHED_TIMES} times duration_s",
        ),
        _between(
            "rating_out_of_range",
            "rating",
            0,
            10,
            "rating is outside 0 to 10 or not a finite number",
        ),
        _must_be(
            "exact_duplicate",
            "repeats_an_earlier_row",
            False,
            "every column equals that of an earlier row (the first is kept)",
        ),
        Rule(
            "event_contradicted",
            "contradicts_an_earlier_row",
            "ExpectColumnValuesToBeInSet",
            {"value_set": [False]},
            "user_id, item_id and timestamp equal those of an earlier row, other columns do not",
            "warning",
        ),
        _must_be(
            "item_unknown",
            "item_is_known",
            True,
            "item_id is not in the items table, or its item is in quarantine",
        ),
        _must_be(
            "user_unknown",
            "user_is_known",
            True,
            "user_id is not in the users table, or its user is in quarantine",
        ),
    ),
    table_rules=(
        _NOT_EMPTY,
        _SOME_PASS,
        _QUARANTINE,
        _at_most(
            "items_table_incomplete",
            "share_of_item_unknown",
            Parameter("max_quarantine_share"),
            "too many interactions have an item that the items table does not list",
            "export items and interactions from the same day, or leave the items table out: ids "
            "are then taken from the interactions",
        ),
        _at_most(
            "users_table_incomplete",
            "share_of_user_unknown",
            Parameter("max_quarantine_share"),
            "too many interactions have a user that the users table does not list",
            "check which column was read as user_id, export users and interactions from the same "
            "day, or leave the users table out: ids are then taken from the interactions",
        ),
        _at_most(
            "events_contradicted",
            "share_of_event_contradicted",
            CONTRADICTED,
            "too many rows tell of an event that an earlier row tells of otherwise",
            "keep one row of each event: the log may have been joined with another version of "
            "itself, or its times cut to whole days",
        ),
        _at_least(
            "single_user",
            "span_of_user_id",
            1,
            "all interactions are of one user",
            "check which column was read as user_id",
        ),
        _at_least(
            "single_item",
            "span_of_item_id",
            1,
            "all interactions are with one item",
            "check which column was read as item_id",
        ),
        _at_least(
            "single_moment",
            "span_of_timestamp",
            1,
            "all interactions have the same timestamp, so nothing has an order",
            "check which column was read as timestamp and its unit",
        ),
        _at_most(
            "watch_time_unit",
            "mean_of_watch_time_s",
            LIKELY_MILLISECONDS_S,
            "watch_time_s is hours on average: it may be in milliseconds",
            "give watch_time_s in seconds",
            "warning",
        ),
        _at_most(
            "duration_unit",
            "mean_of_duration_s",
            LIKELY_MILLISECONDS_S,
            "duration_s is hours on average: it may be in milliseconds",
            "give duration_s in seconds",
            "warning",
        ),
        _at_most(
            "watched_times_high",
            "typical_watched_times",
            LIKELY_EXCHANGED,
            "videos are watched more than twice on average: watch_time_s and duration_s may be "
            "exchanged, or in different units",
            "check which columns were read as watch_time_s and duration_s",
            "warning",
        ),
        _at_most(
            "two_time_zones",
            "span_of_hours_after_date",
            HOURS_OF_ONE_ZONE,
            "the hours from date to timestamp span more than a day: some times are of another time "
            "zone than the rest, perhaps local where the rest is UTC",
            "write all times in UTC",
            "warning",
        ),
        _at_most(
            "gap_in_time",
            "gap_share_of_timestamp",
            0.5,
            "no interaction falls in one stretch of more than half of the whole time: some times "
            "may be wrong, or a part of the log is missing",
            "check the oldest and the newest rows and the files they come from",
            "warning",
        ),
        _at_most(
            "user_dominates",
            "largest_share_of_user_id",
            DOMINANT_USER,
            "one user has more than a fifth of all interactions: a bot, a test account or a "
            "placeholder for unknown users",
            "leave out that user, or give unknown users ids of their own",
            "warning",
        ),
        _at_most(
            "item_dominates",
            "largest_share_of_item_id",
            DOMINANT_ITEM,
            "one item has more than half of all interactions: perhaps a placeholder",
            "leave out what stands for no real item",
            "warning",
        ),
        Rule(
            "watch_time_constant",
            "spread_of_watch_time_s",
            "ExpectColumnValuesToBeBetween",
            {"min_value": 0, "strict_min": True},
            "watch_time_s is the same in every row",
            "warning",
            "check which column was read as watch_time_s",
        ),
        *(_always(column) for column in RARE),
        *(_mostly_missing(column) for column in OPTIONAL),
    ),
)

ITEM_SUITE = Suite(
    table="items",
    derived={
        "item_id_seen_before": SeenBefore(("item_id",)),
        "blank_tags": BlankElements("tags"),
        "has_text": AnyText(TEXTS),
        "has_unreadable": Unreadable(TEXTS),
        "longest_text": LongestText(TEXTS),
    },
    spans=("item_id",),
    row_rules=(
        _not_null("item_id"),
        _not_negative("item_id"),
        _must_be(
            "item_id_repeated",
            "item_id_seen_before",
            False,
            "item_id belongs to an earlier row (the first is kept)",
        ),
        _DURATION,
        _between("tag_blank", "blank_tags", None, 0, "a tag is null or blank"),
        Rule(
            "text_missing",
            "has_text",
            "ExpectColumnValuesToBeInSet",
            {"value_set": [True]},
            "title, caption and tags are all empty",
            "warning",
        ),
        Rule(
            "text_unreadable",
            "has_unreadable",
            "ExpectColumnValuesToBeInSet",
            {"value_set": [False]},
            "a text holds control characters or U+FFFD: it was decoded wrongly or cut",
            "warning",
        ),
        Rule(
            "text_too_long",
            "longest_text",
            "ExpectColumnValuesToBeBetween",
            {"max_value": LONGEST_TEXT},
            f"a text has more than {LONGEST_TEXT:,} characters: it may be a whole file",
            "warning",
        ),
    ),
    table_rules=(
        _NOT_EMPTY,
        _SOME_PASS,
        _QUARANTINE,
        _at_least(
            "single_item",
            "span_of_item_id",
            1,
            "the table lists a single item",
            "check which column was read as item_id",
        ),
        _at_most(
            "mostly_without_text",
            "share_of_text_missing",
            0.5,
            "more than half of the items have no title, caption or tag to learn features from",
            "add a title, a caption or tags",
            "warning",
        ),
    ),
)

USER_SUITE = Suite(
    table="users",
    derived={"user_id_seen_before": SeenBefore(("user_id",)), "age_in_years": NumberIfAny("age")},
    spans=("user_id",),
    row_rules=(
        _not_null("user_id"),
        _not_negative("user_id"),
        _must_be(
            "user_id_repeated",
            "user_id_seen_before",
            False,
            "user_id belongs to an earlier row (the first is kept)",
        ),
        Rule(
            "age_impossible",
            "age_in_years",
            "ExpectColumnValuesToBeBetween",
            {"min_value": 0, "max_value": OLDEST},
            f"age is negative or more than {OLDEST} (leave unknown ages null)",
            "warning",
        ),
    ),
    table_rules=(
        _NOT_EMPTY,
        _SOME_PASS,
        _QUARANTINE,
        _at_least(
            "single_user",
            "span_of_user_id",
            1,
            "the table lists a single user",
            "check which column was read as user_id",
        ),
    ),
)

#: Suites in the order in which tables are validated: a table comes after those it refers to.
SUITES: dict[str, Suite] = {s.table: s for s in (ITEM_SUITE, USER_SUITE, INTERACTION_SUITE)}
