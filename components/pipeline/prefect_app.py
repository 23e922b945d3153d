"""Prefect's server, as uvicorn loads it for us: on SQLite its transactions take turns.

Prefect opens a transaction to read and writes later in it. If another connection wrote in between,
SQLite refuses at once, whatever patience it is told to have: events are handled twice, and
requests are declined. A transaction that announces from the start that it will write waits its
turn instead. PostgreSQL needs none of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any


def create_app() -> Any:
    """The application of ``prefect.server.api.server``."""
    from prefect.server.api import server
    from prefect.server.database.configurations import AioSqliteConfiguration

    AioSqliteConfiguration.begin_transaction = _in_turn(AioSqliteConfiguration.begin_transaction)
    return server.create_app()


def _in_turn(begin: Any) -> Any:
    @asynccontextmanager
    async def begin_transaction(
        self: Any, session: Any, with_for_update: bool = False
    ) -> AsyncIterator[Any]:
        async with begin(self, session, with_for_update=True) as transaction:
            yield transaction

    return begin_transaction
