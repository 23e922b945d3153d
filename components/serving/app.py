"""The HTTP face of a replica: routes, statuses and limits; what is behind them is the `Engine`.

Errors are JSON: ``error`` in words, ``where`` as a path into the body, ``remedy``. Bad input is
422, too large a body 413, one that comes too slowly 408, a full queue 429 with Retry-After by the
measured rate, a request that waited too long 504, a service that loads or ends 503, and files of
the service that cannot be used 500.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from components.pipeline.errors import DataContractError, StorageError, UsageError
from components.serving import schema
from components.serving.batching import Closed, Expired, Overloaded
from components.serving.engine import Deployed, Engine, NotReady

#: When a service that loads or ends may be asked again.
COMES_BACK_S = 1
JSON_TYPE = "application/json"
ITEM_ID = r"-?[0-9]{1,19}"
#: So many times the largest body is read and thrown away before the answer that it is too large.
DISCARDED_BODIES = 8
#: Seconds in which the whole body must have come.
BODY_WITHIN_S = 5.0
#: Bytes that are read on the event loop, in about a millisecond; more would hold other calls up.
READ_AT_ONCE = 1 << 15
#: The model of a route's body, by path: for the API's description.
BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/recommend": (schema.RecommendMany, schema.RecommendOne),
    "/v1/items": (schema.AddItems,),
}


Model = TypeVar("Model", bound=BaseModel)


class TooLarge(Exception):
    """The body has more bytes than may be sent."""


class TooSlow(Exception):
    """The body did not come in time."""


class NotJson(Exception):
    """The body is no JSON document."""


def build_app(deployed: Deployed, *, among_others: bool) -> FastAPI:
    """The application of one replica; its engine begins to load.

    Args:
        among_others: other replicas answer meanwhile, so none is sent here before it has loaded.
    """
    app, engine = FastAPI(title="Reelflow recommender", version=deployed.version), Engine(deployed)
    if among_others:
        engine.settled.wait()
        if engine.state == "failed":
            # Ray tries again, and the others answer meanwhile.
            raise RuntimeError(engine.problem)
    _handle_errors(app)
    _describe(app)

    @app.get("/healthz", summary="Whether the process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz", summary="Whether requests are answered: 503 until the model is warm")
    async def readyz() -> JSONResponse:
        ready = engine.state == "ready"
        body = {"status": engine.state} | ({"error": engine.problem} if engine.problem else {})
        headers = {} if ready else {"Retry-After": str(COMES_BACK_S)}
        return JSONResponse(body, 200 if ready else 503, headers)

    @app.get("/v1/model", summary="Version, catalogue and what became of this replica's requests")
    async def model() -> dict[str, Any]:
        return engine.figures()

    @app.post("/v1/recommend", summary="The next items for one request or several")
    async def recommend(request: Request) -> Response:
        asked = await _asked(request, schema.recommend_body)
        each: list[schema.Request] = (
            asked.requests if isinstance(asked, schema.RecommendMany) else [asked]
        )
        waiting = engine.submit(each, asked.top_n, asked.beams, asked.deadline_ms / 1000)
        # A caller that goes away cancels what is still in the queue, and nobody else's.
        lists = await asyncio.gather(*(asyncio.wrap_future(future) for future in waiting))
        answers = [
            {
                "user_id": one.user_id,
                "items": [{"item_id": item, "score": score} for item, score in ranked],
            }
            for one, ranked in zip(each, lists, strict=True)
        ]
        said = {"model": deployed.model, "version": deployed.version, "answers": answers}
        return Response(json.dumps(said, allow_nan=False), media_type=JSON_TYPE)

    @app.post("/v1/items", summary="Take in new items; they may be recommended at once")
    async def add_items(request: Request) -> dict[str, Any]:
        asked = await _asked(request, schema.AddItems.model_validate)
        catalogue = engine.catalogue
        said = await run_in_threadpool(catalogue.add, asked.items)
        return {"items": said, "recommendable": catalogue.now.recommendable}

    @app.delete("/v1/items/{item_id}", summary="Recommend an item no more")
    async def withdraw(item_id: str) -> Response:
        catalogue = engine.catalogue
        # Of what `int` takes, only what an id is written as: 1_000 is no item 1000.
        number = int(item_id) if re.fullmatch(ITEM_ID, item_id) else 2**63
        found = -(2**63) <= number < 2**63 and await run_in_threadpool(catalogue.withdraw, number)
        if not found:
            return _error(404, "there is no such item", where=f"item {item_id[:64]}")
        said = {"item_id": number, "recommendable": catalogue.now.recommendable}
        return JSONResponse(said)

    return app


async def _asked(request: Request, validate: Callable[[dict[str, Any]], Model]) -> Model:
    """What a request asks for.

    Raises:
        TooLarge, TooSlow, NotJson, ValidationError.
    """
    try:
        async with asyncio.timeout(BODY_WITHIN_S):
            data = await _bytes(request)
    except TimeoutError:
        raise TooSlow from None
    if len(data) <= READ_AT_ONCE:
        return validate(_object_of(data))
    return await run_in_threadpool(lambda: validate(_object_of(data)))


def _object_of(data: bytearray) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        NotJson
    """
    try:
        # Bytes that are no text would pass as halves of surrogate pairs.
        body = json.loads(data.decode(), object_pairs_hook=_object)
        if b"\\ud" in data.lower():
            # Half of a surrogate pair is a string to JSON, and to no file.
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise NotJson(str(error).partition("\n")[0][:200]) from error
    if not isinstance(body, dict):
        raise NotJson("it is no object")
    return body


async def _bytes(request: Request) -> bytearray:
    data, sent = bytearray(), 0
    async for part in request.stream():
        sent += len(part)
        if sent <= schema.BODY_BYTES:
            data += part
        elif sent > DISCARDED_BODIES * schema.BODY_BYTES:
            break
    if sent > schema.BODY_BYTES:
        # Said after the last byte: a caller who still sends would see a broken connection instead.
        raise TooLarge
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose names stands once: which of two values is meant nobody knows."""
    made = dict(pairs)
    if len(made) < len(pairs):
        count = Counter(name for name, _ in pairs)
        twice = next(name for name in made if count[name] > 1)
        raise ValueError(f"'{twice[:64]}' stands twice in an object")
    return made


def _error(
    status: int,
    what: str,
    *,
    where: str | None = None,
    remedy: str | None = None,
    retry_after_s: float | None = None,
    more: dict[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    said = {"error": what, "where": where, "remedy": remedy}
    headers = dict(headers or {})
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    body = {name: text for name, text in said.items() if text is not None} | (more or {})
    return JSONResponse(body, status, headers)


def _handle_errors(app: FastAPI) -> None:
    def on(kind: type[Exception], answer: Callable[[Any], JSONResponse]) -> None:
        async def handle(request: Request, error: Exception) -> JSONResponse:
            return answer(error)

        app.add_exception_handler(kind, handle)

    on(ValidationError, _invalid)
    on(NotJson, lambda e: _error(422, f"the body is no JSON object: {e}", where="body"))
    on(
        TooLarge,
        lambda e: _error(
            413,
            f"the body has more than {schema.BODY_BYTES} bytes",
            where="body",
            remedy="send fewer requests or items in one call",
        ),
    )
    on(
        TooSlow,
        lambda e: _error(
            408, f"the body did not come within {BODY_WITHIN_S:.0f} seconds", where="body"
        ),
    )
    on(
        Overloaded,
        lambda e: _error(
            429,
            "more requests than can be answered in time",
            remedy="come back after the seconds of Retry-After",
            retry_after_s=e.retry_after_s,
        ),
    )
    on(
        Expired,
        lambda e: _error(
            504,
            f"not answered: the request {e}, longer than its deadline_ms",
            where="deadline_ms",
        ),
    )
    for kind in (NotReady, Closed):
        on(
            kind,
            lambda e: _error(503, str(e) or "the service is ending", retry_after_s=COMES_BACK_S),
        )
    for wrong in (UsageError, DataContractError):
        on(wrong, lambda e: _error(422, e.what, where=e.where, remedy=e.remedy))
    on(StorageError, lambda e: _error(500, e.what, where=e.where, remedy=e.remedy))
    on(HTTPException, lambda e: _error(e.status_code, str(e.detail).lower(), headers=e.headers))
    on(
        Exception,
        lambda e: _error(
            500, f"the request could not be computed: {type(e).__name__}: {e}", where="body"
        ),
    )


def _invalid(error: ValidationError) -> JSONResponse:
    """What is wrong with a body, each with its path; values are not sent back."""
    wrong = [
        {"where": _path(found["loc"]), "error": found["msg"].removeprefix("Value error, ")}
        for found in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    first = wrong[0]
    return _error(422, first["error"], where=first["where"], more={"errors": wrong[:20]})


def _path(place: tuple[int | str, ...]) -> str:
    """``requests[2].history[0].item_id``"""
    path = ""
    for part in place:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return path[:200] or "body"


def _describe(app: FastAPI) -> None:
    """Put the bodies into the description of the API, which FastAPI makes of what it parses."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = made()
        models = [model for kinds in BODIES.values() for model in kinds]
        wanted = [(model, "validation") for model in models]
        wanted.append((schema.Answers, "serialization"))
        names, defined = models_json_schema(
            wanted,  # type: ignore[arg-type]
            ref_template="#/components/schemas/{model}",
        )
        parts = document.setdefault("components", {}).setdefault("schemas", {})
        parts |= defined["$defs"]
        for path, kinds in BODIES.items():
            any_of = [names[(kind, "validation")] for kind in kinds]
            content = {"schema": any_of[0] if len(any_of) == 1 else {"anyOf": any_of}}
            document["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {JSON_TYPE: content},
            }
        answers = {"schema": names[(schema.Answers, "serialization")]}
        good = document["paths"]["/v1/recommend"]["post"]["responses"]["200"]
        good["content"] = {JSON_TYPE: answers}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
