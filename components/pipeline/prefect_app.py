"""Prefect's server, as uvicorn loads it for us: on SQLite its transactions take turns.

Prefect opens a transaction to read and writes later in it. If another connection wrote in between,
SQLite refuses at once, whatever patience it is told to have: events are handled twice, and
requests are declined. A transaction that announces from the start that it will write waits its
turn instead. PostgreSQL needs none of it.

It also refuses parameters that the database could not give back.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


def create_app() -> Any:
    """The application of ``prefect.server.api.server``."""
    from prefect.server.api import server
    from prefect.server.database.configurations import AioSqliteConfiguration

    AioSqliteConfiguration.begin_transaction = _in_turn(AioSqliteConfiguration.begin_transaction)
    return _RefusesWhatCannotBeKept(server.create_app())


def _in_turn(begin: Any) -> Any:
    @asynccontextmanager
    async def begin_transaction(
        self: Any, session: Any, with_for_update: bool = False
    ) -> AsyncIterator[Any]:
        async with begin(self, session, with_for_update=True) as transaction:
            yield transaction

    return begin_transaction


class _RefusesWhatCannotBeKept:
    """Answers 422 to a run or deployment with values that JSON can say and no database keeps.

    Half of a surrogate pair, a null character, NaN or an infinity in a parameter: Prefect would
    store the run and then fail at every look at it, its own runner's looks among them.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not _brings_parameters(scope):
            await self._app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if (fault := find_fault(body)) is not None:
            await _refuse(send, *fault)
            return
        given = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def again() -> Any:
            return next(given, None) or await receive()

        await self._app(scope, again, send)


def _brings_parameters(scope: Any) -> bool:
    if scope["type"] != "http" or scope["method"] not in ("POST", "PATCH"):
        return False
    return any(f"/{kind}/" in scope["path"] for kind in ("deployments", "flow_runs"))


def find_fault(body: bytes) -> tuple[list[str | int], str] | None:
    """Path and reason of the first value in a JSON body that cannot be kept; None without one."""
    if not any(mark in body for mark in (b"NaN", b"Infinity", b"\\u0000", b"\\ud", b"\\uD")):
        return None
    try:
        return _fault_in(json.loads(body), [])
    except ValueError:
        # No JSON: the server says so itself.
        return None


def _fault_in(value: Any, path: list[str | int]) -> tuple[list[str | int], str] | None:
    if isinstance(value, float) and not math.isfinite(value):
        return path, "a finite number is needed"
    if isinstance(value, str):
        if "\0" in value:
            return path, "a text cannot hold a null character"
        if any("\ud800" <= character <= "\udfff" for character in value):
            return path, "a text cannot hold half of a surrogate pair"
    parts: Any = ()
    if isinstance(value, dict):
        for name in value:
            if _fault_in(name, path) is not None:
                return path, "a name that is no text"
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    found = (_fault_in(part, [*path, name]) for name, part in parts)
    return next(filter(None, found), None)


async def _refuse(send: Any, path: list[str | int], why: str) -> None:
    """As Prefect refuses a body that does not validate."""
    detail = [{"loc": ["body", *path], "msg": why, "type": "value_error"}]
    answer = {"exception_message": "Invalid request received.", "exception_detail": detail}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 422, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
