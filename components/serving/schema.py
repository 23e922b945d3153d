"""What the service takes and gives: validated requests, and their columns for the model.

Ids and times are whole numbers of 64 bits, seconds are finite. An unknown field is refused: a
misspelt signal would be read as "unknown" without a word.

Shapes: B requests, E events of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from components.data.buckets import ENGAGEMENT, LONG_WATCH_S
from components.data.contracts import FEEDBACK
from components.evaluation.registration.serving import OF_REQUEST, OPTIONAL, TOP_N

#: Limits of one call. A history is told by its newest events; only a lifelong pathway of more
#: entries would read further back.
MAX_REQUESTS, MAX_EVENTS, MAX_TOP_N, MAX_BEAMS = 64, 4096, 1000, 1024
MAX_FEATURES, MAX_ITEMS, MAX_TEXT, MAX_TAGS, MAX_LEVELS, MAX_WIDTH = (
    256,
    1000,
    10_000,
    256,
    8,
    65_536,
)
BODY_BYTES = 8 << 20
#: Milliseconds that a request may wait for its turn where it names no time of its own.
DEADLINE_MS = 1000

Id = Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)]
Time = Annotated[int, Field(ge=0, lt=2**53, strict=True)]
Seconds = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class Strict(BaseModel):
    """Refuses what it does not know."""

    model_config = ConfigDict(extra="forbid")


class Event(Strict):
    """Something that the user did; what is not said is unknown."""

    item_id: Id
    timestamp_ms: Time | None = Field(
        None, description="since 1970-01-01 UTC; unknown: taken to be that of the event before"
    )
    watch_time_s: Seconds | None = None
    duration_s: Seconds | None = Field(None, description="length of the video")
    click: Flag | None = None
    long_view: Flag | None = None
    like: Flag | None = None
    follow: Flag | None = None
    forward: Flag | None = None
    comment: Flag | None = None
    profile_enter: Flag | None = None
    dislike: Flag | None = None
    positive: Flag | None = Field(
        None, description="liked; unknown: told by the feedback and the time watched"
    )

    def feedback_bits(self) -> int:
        """Bit i is set where ``FEEDBACK[i]`` is true."""
        return sum(1 << bit for bit, name in enumerate(FEEDBACK) if getattr(self, name))

    def is_positive(self) -> bool:
        """As told; else by the rules of the split.

        Where no preference is known an event is positive unless it was disliked or not clicked.
        """
        if self.positive is not None:
            return self.positive
        signals = [getattr(self, name) for name in ENGAGEMENT]
        if any(signals):
            return True
        if self.long_view is None and self.watch_time_s is not None:
            return self.watch_time_s >= LONG_WATCH_S
        if any(signal is not None for signal in signals):
            return False
        return not self.dislike and self.click is not False


class Request(Strict):
    """One user's history, oldest event first."""

    history: list[Event] = Field(max_length=MAX_EVENTS)
    request_timestamp_ms: Time | None = Field(
        None, description="now, since 1970-01-01 UTC; unknown: the time of the newest event"
    )
    user_id: Id | None = Field(
        None, description="its features are those at the time of training; comes back in the answer"
    )
    user_features: dict[str, Annotated[str, Field(max_length=MAX_TEXT)]] | None = Field(
        None,
        max_length=MAX_FEATURES,
        description="columns of the users' table as text, instead of what is known of user_id",
    )
    exclude_seen: Flag = Field(False, description="leave out items of the history")

    @model_validator(mode="after")
    def _oldest_first(self) -> Self:
        last = 0
        for place, event in enumerate(self.history):
            if event.timestamp_ms is None:
                continue
            if event.timestamp_ms < last:
                raise ValueError(
                    f"history[{place}].timestamp_ms is before that of an earlier event; give the "
                    "oldest event first"
                )
            last = event.timestamp_ms
        return self

    def seen(self) -> set[int]:
        return {event.item_id for event in self.history}


class Options(Strict):
    """How a call is answered."""

    top_n: Annotated[int, Field(ge=1, le=MAX_TOP_N, strict=True)] = Field(
        TOP_N, description="items a list at most"
    )
    beams: Annotated[int, Field(ge=1, le=MAX_BEAMS, strict=True)] | None = Field(
        None, description="width of the beam; default: the width that was evaluated"
    )
    deadline_ms: Annotated[int, Field(ge=1, le=600_000, strict=True)] = Field(
        DEADLINE_MS, description="a request that waited longer for its turn is not computed"
    )


class RecommendOne(Request, Options):
    """One request with its options: the short form."""


class RecommendMany(Options):
    """Several requests with the same options."""

    requests: list[Request] = Field(min_length=1, max_length=MAX_REQUESTS)


def recommend_body(body: dict[str, Any]) -> RecommendOne | RecommendMany:
    """Of either form.

    Raises:
        ValidationError
    """
    return (RecommendMany if "requests" in body else RecommendOne).model_validate(body)


class NewItem(Strict):
    """An item that may be recommended from now on: its content, or where that leads.

    ``semantic_id`` or ``embedding`` say it directly, in the space of the model's own items.
    """

    item_id: Id
    title: Text | None = None
    caption: Text | None = None
    tags: list[Text] | None = Field(None, max_length=MAX_TAGS)
    author_id: Id | None = None
    duration_s: Seconds | None = None
    semantic_id: list[Annotated[int, Field(ge=0, lt=2**31, strict=True)]] | None = Field(
        None, min_length=1, max_length=MAX_LEVELS
    )
    embedding: (
        list[Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False, strict=True)]] | None
    ) = Field(None, min_length=1, max_length=MAX_WIDTH)

    @model_validator(mode="after")
    def _told_once(self) -> Self:
        if self.semantic_id is not None and self.embedding is not None:
            raise ValueError("give semantic_id or embedding, not both")
        return self


class AddItems(Strict):
    """Items to take in."""

    items: list[NewItem] = Field(min_length=1, max_length=MAX_ITEMS)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        first: dict[int, int] = {}
        for place, item in enumerate(self.items):
            before = first.setdefault(item.item_id, place)
            if before != place:
                raise ValueError(
                    f"items[{place}].item_id {item.item_id} stands at items[{before}] already"
                )
        return self


class Recommended(BaseModel):
    """An item of a list."""

    item_id: int
    score: float = Field(description="log-probability of its semantic id")


class Answer(BaseModel):
    """The list of one request, best first."""

    user_id: int | None = None
    items: list[Recommended]


class Answers(BaseModel):
    """The lists of a call in the order of its requests."""

    model: str
    version: str
    answers: list[Answer]


def requests_table(requests: Sequence[Request]) -> pa.Table:
    """The columns that `ServedRecommender.recommend` reads."""
    columns: dict[str, list[Any]] = {"item_ids": [], **{name: [] for name in OPTIONAL}}
    for request in requests:
        events = request.history
        columns["item_ids"].append([event.item_id for event in events])
        columns["feedback"].append([event.feedback_bits() for event in events])
        columns["positive"].append([event.is_positive() for event in events])
        for name in ("timestamp_ms", "watch_time_s", "duration_s"):
            columns[name].append([getattr(event, name) for event in events])
    kinds = {"item_ids": pa.int64()} | {name: kind for name, (kind, _) in OPTIONAL.items()}
    arrays = {name: pa.array(rows, pa.list_(kinds[name])) for name, rows in columns.items()}
    for name, kind in OF_REQUEST.items():
        told = [getattr(request, name) for request in requests]
        if any(value is not None for value in told):
            arrays[name] = pa.array(told, kind)
    return pa.table(arrays)
