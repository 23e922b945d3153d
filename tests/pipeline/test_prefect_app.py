"""Our way to start Prefect's server: transactions on SQLite that read first do not collide."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from components.pipeline.prefect_app import _in_turn, find_fault


async def collide(configuration: Any) -> int:
    """Two transactions read, and then both write; how many are refused."""
    import sqlalchemy as sa

    engine = await configuration.engine()
    async with engine.begin() as connection:
        await connection.execute(sa.text("CREATE TABLE t (n INTEGER)"))
        await connection.execute(sa.text("INSERT INTO t VALUES (0)"))

    async def increment() -> None:
        session = await configuration.session(engine)
        async with session, configuration.begin_transaction(session):
            await session.execute(sa.text("SELECT n FROM t"))
            await asyncio.sleep(0.3)
            await session.execute(sa.text("UPDATE t SET n = n + 1"))

    results = await asyncio.gather(increment(), increment(), return_exceptions=True)
    await engine.dispose()
    return sum(isinstance(result, Exception) for result in results)


@pytest.mark.parametrize(("ours", "refused"), [(False, 1), (True, 0)])
def test_transactions_that_read_first_take_turns(ours: bool, refused: int, tmp_path: Path) -> None:
    from prefect.server.database.configurations import AioSqliteConfiguration

    class Configuration(AioSqliteConfiguration):
        pass

    if ours:
        Configuration.begin_transaction = _in_turn(AioSqliteConfiguration.begin_transaction)
    configuration = Configuration(f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}")
    assert asyncio.run(collide(configuration)) == refused


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (rb'{"parameters": {"a": {"b": "x\u0000"}}}', ["parameters", "a", "b"]),
        (rb'{"parameters": {"a": ["fine", "\ud800"]}}', ["parameters", "a", 1]),
        (rb'{"parameters": {"a": NaN}}', ["parameters", "a"]),
        (rb'{"parameters": {"a": [1, -Infinity]}}', ["parameters", "a", 1]),
        (rb'{"parameters": {"\udfff": 1}}', ["parameters"]),
        (rb'{"parameters": {"a": "\ud83d\ude00", "b": "NaN", "c": 1.5}}', None),
        (rb'{"parameters": {"a": NaN', None),
    ],
)
def test_values_that_no_database_keeps_are_found_by_their_path(
    body: bytes, path: list[str | int] | None
) -> None:
    found = find_fault(body)
    assert (found and found[0]) == path
