"""`reelflow serve`, really started once: Ray Serve, HTTP, a champion of a real registry."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
from registration_world import BEAMS, ITEMS, NAME, first_catalogue, requests
from safetensors.numpy import load_file, save_file
from service_world import (
    EVALUATED_BEAMS,
    Reply,
    Service,
    register,
    register_champion,
    settings_of,
)

from benchmarks import onerec_serving
from components.data.contracts import FEEDBACK
from components.evaluation.registration import serving
from components.evaluation.registration.serving import ServedRecommender
from components.pipeline.errors import CorruptArtifactError, StageError, UsageError
from components.pipeline.settings import Settings
from components.pipeline.tracking import connect
from components.serving import schema
from components.serving.app import BODY_WITHIN_S, READ_AT_ONCE
from components.serving.catalogue import Catalogue
from components.serving.champion_files import choose
from components.serving.journal import Journal
from components.serving.service import (
    LOOKS_EVERY_S,
    ServeOptions,
    _application,
    _deployed,
    require_port,
    serve,
)

QUEUE = 64


class World:
    """The running service, and the model it serves, loaded here as well."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.files = register_champion(self.home, folder / "registered")
        self.expected = ServedRecommender.from_files(self.files)
        self.service = Service(self.home, "--queue", str(QUEUE), "--threads", "1")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("service"))
    yield made
    made.service.end(signal.SIGKILL)


def as_events(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The columns of a request of the model as events of a request of the service."""
    events = []
    for place, item_id in enumerate(row["item_ids"]):
        event = {"item_id": item_id, "positive": row["positive"][place]}
        for name in ("timestamp_ms", "watch_time_s", "duration_s"):
            value = row[name][place]
            if value == value:
                event[name] = value
        bits = row["feedback"][place]
        events.append(event | {name: bool(bits >> bit & 1) for bit, name in enumerate(FEEDBACK)})
    return events


def as_request(row: dict[str, Any]) -> dict[str, Any]:
    told = {"history": as_events(row), "request_timestamp_ms": row["request_timestamp_ms"]}
    return told | with_user(row)


def with_user(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("user_id", "user_features") if row.get(name) is not None}


def lists(reply: Reply) -> list[dict[int, float]]:
    assert reply.status == 200, reply
    return [{i["item_id"]: i["score"] for i in a["items"]} for a in reply.body["answers"]]


def expected(world: World, rows: list[dict[str, Any]], **options: int) -> list[dict[int, float]]:
    answers = world.expected.recommend(serving.requests_table(pd.DataFrame(rows)), **options)
    pairs = zip(answers["item_ids"].to_pylist(), answers["scores"].to_pylist(), strict=True)
    return [dict(zip(items, scores, strict=True)) for items, scores in pairs]


@pytest.mark.slow
def test_it_is_ready_when_it_says_so_and_tells_what_it_serves(world: World) -> None:
    assert world.service.get("/healthz").status == 200
    assert world.service.get("/readyz").body == {"status": "ready"}
    told = world.service.get("/v1/model").body
    assert (told["model"], told["version"], told["beams"]) == (NAME, "1", EVALUATED_BEAMS)
    assert told["catalogue"]["recommendable"] == ITEMS


@pytest.mark.parametrize(("top_n", "beams"), [(20, None), (7, 16), (100, 64)])
def test_answers_are_those_of_the_model(world: World, top_n: int, beams: int | None) -> None:
    rows = requests(first_catalogue())
    for place in range(0, len(rows), 3):
        rows[place]["user_features"] = {"age": "1", "town": f"town {place % 4}", "other": "x"}
    body = {"requests": [as_request(row) for row in rows], "top_n": top_n, "deadline_ms": 60_000}
    found = lists(world.service.post("/v1/recommend", body | ({"beams": beams} if beams else {})))
    wanted = expected(world, rows, top_n=top_n, beams=beams or EVALUATED_BEAMS)
    assert len(found) == len(wanted) == len(rows)
    for ours, theirs in zip(found, wanted, strict=True):
        # Items of nearly the same score may change places: sums differ with the batch.
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)
        assert sum(item in theirs for item in ours) >= len(theirs) - 1


def test_requests_of_many_callers_and_widths_at_once_are_answered_as_alone(world: World) -> None:
    rows = requests(first_catalogue())[:24]
    widths = [(8, 16, 64)[n % 3] for n in range(len(rows))]

    def ask(n: int) -> dict[int, float]:
        body = as_request(rows[n]) | {"top_n": 9, "beams": widths[n], "deadline_ms": 60_000}
        (one,) = lists(world.service.post("/v1/recommend", body))
        return one

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(len(rows))))
    for n, ours in enumerate(found):
        (theirs,) = expected(world, [rows[n]], top_n=9, beams=widths[n])
        assert list(ours.values()) == pytest.approx(list(theirs.values()), abs=1e-5)


def test_seen_items_are_left_out_and_the_list_is_still_full(world: World) -> None:
    row = next(row for row in requests(first_catalogue()) if len(row["item_ids"]) > 4)
    (whole,) = expected(world, [row], top_n=ITEMS, beams=BEAMS)
    body = as_request(row) | {"exclude_seen": True, "top_n": 30}
    reply = world.service.post("/v1/recommend", body)
    (found,) = lists(reply)
    assert list(found) == [item for item in whole if item not in row["item_ids"]][:30]
    assert reply.body["answers"][0]["user_id"] == row["user_id"]


def wait_for(condition: Callable[[], Any], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline


ONE = {"item_id": 1000}


@pytest.mark.parametrize(
    ("body", "where", "message"),
    [
        ({}, "history", "required"),
        ({"history": [ONE], "topn": 3}, "topn", "not permitted"),
        ({"history": [ONE], "top_n": 0}, "top_n", "greater than or equal to 1"),
        ({"history": [ONE], "top_n": 1001}, "top_n", "less than or equal to 1000"),
        ({"history": [ONE], "beams": 4096}, "beams", "1024"),
        ({"history": [ONE], "top_n": True}, "top_n", "integer"),
        ({"requests": []}, "requests", "at least 1"),
        ({"requests": [{"history": []}] * 65}, "requests", "at most 64"),
        ({"history": [ONE] * 4097}, "history", "at most 4096"),
        (
            {"requests": [{"history": []}, {"history": [ONE, {"item_id": "x"}]}]},
            "requests[1].history[1].item_id",
            "integer",
        ),
        ({"history": [{"item_id": 2**63}]}, "history[0].item_id", "less than"),
        ({"history": [ONE | {"liked": True}]}, "history[0].liked", "not permitted"),
        ({"history": [ONE | {"watch_time_s": float("nan")}]}, "history[0].watch_time_s", "finite"),
        ({"history": [ONE | {"watch_time_s": -1}]}, "history[0].watch_time_s", "equal to 0"),
        (
            {"history": [ONE | {"timestamp_ms": 5}, ONE | {"timestamp_ms": 4}]},
            "body",
            "history[1].timestamp_ms is before",
        ),
        (b"{", "body", "no JSON"),
        (b"[1]", "body", "no JSON object"),
        (b"[" * 100_000, "body", "no JSON"),
        (b"\xff\xfe", "body", "no JSON"),
        (b'{"history": [{"item_id": 1, "\\ud800": 1}]}', "body", "no JSON"),
        (b'{"history": [], "user_features": {"\xed\xa0\x80": "x"}}', "body", "no JSON"),
        (
            b'{"history": [{"item_id": 1, "like": true, "like": false}]}',
            "body",
            "'like' stands twice",
        ),
    ],
)
def test_bad_input_is_told_with_its_path(world: World, body: Any, where: str, message: str) -> None:
    reply = world.service.post("/v1/recommend", body)
    assert reply.status == 422, reply
    assert reply.body["where"] == where
    assert message in reply.body["error"]


@pytest.mark.parametrize(
    ("said", "positive"),
    [
        ({}, True),
        ({"click": True}, True),
        ({"click": False}, False),
        ({"dislike": True}, False),
        ({"dislike": True, "click": True}, False),
        ({"dislike": True, "like": True}, True),
        ({"dislike": True, "positive": True}, True),
        ({"like": False}, False),
        ({"like": False, "click": True}, False),
        ({"long_view": False, "watch_time_s": 60.0}, False),
        ({"watch_time_s": 18.0}, True),
        ({"watch_time_s": 17.9, "click": True}, False),
    ],
)
def test_what_an_event_tells_makes_it_positive_or_not(said: dict[str, Any], positive: bool) -> None:
    assert schema.Event(item_id=1, **said).is_positive() is positive


def test_what_is_not_there_is_told_as_other_errors(world: World) -> None:
    assert world.service.get("/v2").body == {"error": "not found"}
    reply = world.service.get("/v1/recommend")
    assert (reply.status, reply.body) == (405, {"error": "method not allowed"})
    assert reply.headers["allow"] == "POST"


def test_a_body_that_is_too_large_is_refused(world: World) -> None:
    reply = world.service.post("/v1/recommend", b" " * (schema.BODY_BYTES + 1))
    assert (reply.status, reply.body["where"]) == (413, "body")


def test_the_description_names_every_field(world: World) -> None:
    document = world.service.get("/openapi.json").body
    parts = document["components"]["schemas"]
    assert set(parts["Event"]["properties"]) >= {"item_id", "timestamp_ms", *FEEDBACK}
    body = document["paths"]["/v1/recommend"]["post"]["requestBody"]["content"]
    named = [part["$ref"] for part in body["application/json"]["schema"]["anyOf"]]
    assert named == [f"#/components/schemas/{n}" for n in ("RecommendMany", "RecommendOne")]
    text = json.dumps(document)
    assert all(ref.partition('"')[0] in parts for ref in text.split("#/components/schemas/")[1:])


def test_a_burst_is_told_to_come_back_and_all_is_well_afterwards(world: World) -> None:
    many = {"requests": [{"history": [ONE]}] * 32, "beams": 64, "deadline_ms": 60_000}
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda _: world.service.post("/v1/recommend", many), range(24)))
    statuses = [reply.status for reply in replies]
    assert set(statuses) == {200, 429}
    for reply in replies:
        if reply.status == 429:
            assert 1 <= int(reply.headers["retry-after"]) < 60
    assert world.service.get("/readyz").status == 200
    assert len(lists(world.service.post("/v1/recommend", many))) == 32
    assert world.service.get("/v1/model").body["requests"]["refused"] == 32 * statuses.count(429)


def test_callers_who_hang_up_are_not_computed_and_disturb_nobody(world: World) -> None:
    host, port = world.service.address.removeprefix("http://").split(":")
    slow = {"requests": [{"history": [ONE]}] * 64, "beams": 1024, "deadline_ms": 60_000}
    body = json.dumps(slow).encode()
    head = f"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    before = world.service.get("/v1/model").body["requests"]
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: world.service.get("/v1/model").body["waiting"])
    patient = {"history": [ONE], "deadline_ms": 60_000}
    assert len(lists(world.service.post("/v1/recommend", patient))) == 1
    after = world.service.get("/v1/model").body["requests"]
    assert after["cancelled"] > before["cancelled"]
    assert after["failed"] == before["failed"] == 0


def test_callers_who_send_slowly_hold_nobody_up(world: World) -> None:
    host, port = world.service.address.removeprefix("http://").split(":")
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
    with ExitStack() as connections:
        slow = [
            connections.enter_context(socket.create_connection((host, int(port))))
            for _ in range(5 * QUEUE)
        ]
        for connection in slow:
            connection.sendall(head)
        began = time.monotonic()
        patient = {"history": [ONE], "deadline_ms": 60_000}
        assert len(lists(world.service.post("/v1/recommend", patient))) == 1
        assert time.monotonic() - began < BODY_WITHIN_S
        slow[0].settimeout(3 * BODY_WITHIN_S)
        assert b" 408 " in slow[0].recv(4096)


def test_a_table_of_new_items_that_cannot_be_read_is_told(world: World) -> None:
    file = Journal(world.home / "serving" / NAME).file
    file.write_bytes(b"no table")
    try:
        wait_for(lambda: "error" in world.service.get("/readyz").body)
        assert len(lists(world.service.post("/v1/recommend", {"history": [ONE]}))) == 1
        reply = world.service.post(
            "/v1/items", {"items": [{"item_id": 7, "semantic_id": [0, 0, 1]}]}
        )
        assert (reply.status, reply.body["where"]) == (500, str(file))
        assert "post the items again" in reply.body["remedy"]
    finally:
        file.unlink()
    wait_for(lambda: world.service.get("/readyz").body == {"status": "ready"})


def test_a_replica_that_dies_is_started_again(world: World) -> None:
    (replica,) = world.service.replicas()
    replica.kill()

    def is_back() -> bool:
        again = world.service.replicas()
        return bool(again and replica not in again and world.service.ready())

    wait_for(is_back, 60)
    assert len(lists(world.service.post("/v1/recommend", {"history": [ONE]}))) == 1
    # The service looked at it meanwhile, and did not end for it.
    time.sleep(2 * LOOKS_EVERY_S)
    assert world.service.process.poll() is None


def test_nobody_is_sent_to_a_replica_that_still_loads(world: World) -> None:
    service = Service(world.home, "--replicas", "2", "--threads", "1")
    try:

        def replicas() -> set[int]:
            return {process.pid for process in service.replicas()}

        wait_for(lambda: len(replicas()) == 2)
        before = replicas()
        (first, _) = before
        psutil.Process(first).kill()
        said = []

        def both_answer() -> bool:
            reply = service.post("/v1/recommend", {"history": [ONE]})
            said.append(str(reply.body))
            uptimes = {service.get("/v1/model").body.get("uptime_s", 1e9) for _ in range(4)}
            return len(replicas() - before) == 1 and min(uptimes) < time.monotonic() - killed

        killed = time.monotonic()
        wait_for(both_answer, within_s=90.0)
        assert not [text for text in said if "loading" in text]
    finally:
        service.end()


def test_large_bodies_are_read_beside_the_event_loop_and_told_alike(world: World) -> None:
    events = [{"item_id": 1}] * 200
    many = {"requests": [{"history": events}] * 40, "deadline_ms": 60_000}
    assert len(json.dumps(many)) > 2 * READ_AT_ONCE
    assert len(lists(world.service.post("/v1/recommend", many))) == 40
    many["requests"][39] = {"history": [*events, {"item": 2}]}
    reply = world.service.post("/v1/recommend", many)
    assert (reply.status, reply.body["where"]) == (422, "requests[39].history[200].item_id")
    assert world.service.post("/v1/items", b"[" * (2 * READ_AT_ONCE)).status == 422


def test_a_new_item_is_recommended_at_once_and_after_a_restart(
    world: World, tmp_path: Path
) -> None:
    reply = world.service.post("/v1/items", {"items": [{"item_id": 7, "semantic_id": [0, 0, 1]}]})
    assert reply.status == 200, reply
    assert reply.body["items"][0]["status"] == "added"
    asked = {"history": [ONE], "top_n": 100}
    (found,) = lists(world.service.post("/v1/recommend", asked))
    assert 7 in found
    # What a service that starts now would load.
    again = Catalogue(world.files, Journal(world.home / "serving" / NAME))
    assert 7 in again.now.served.item_id_N

    assert world.service.delete("/v1/items/1003").status == 200
    (found,) = lists(world.service.post("/v1/recommend", asked))
    assert (7 in found, 1003 in found) == (True, False)
    assert world.service.delete("/v1/items/5").status == 404
    # What Python would read as 1006, and nobody writes an id like that.
    for item_id in ("x", "1_006", "%201006", "+1006", "%EF%BC%911006", 19 * "9", 20 * "9"):
        assert world.service.delete(f"/v1/items/{item_id}").status == 404, item_id
    wrong = {"items": [{"item_id": 8, "semantic_id": [0, 0, 99]}]}
    reply = world.service.post("/v1/items", wrong)
    assert (reply.status, reply.body["where"]) == (422, "items[0].semantic_id")
    assert "remedy" in reply.body


def test_the_benchmark_measures_a_running_service(world: World) -> None:
    small = onerec_serving.Load(0.5, 1, (8,), (20.0,))
    item_ids = first_catalogue().tolist()
    before = world.service.get("/v1/model").body["requests"]["answered"]
    results = {r.name: r for r in onerec_serving.measure(world.service.address, item_ids, small)}
    assert results["answered_20_per_second_8_beams"].ours == 1
    assert results["highest_rate_with_p99_below_100ms"].ours in (0, 20)
    assert 0 < results["p50_20_per_second_8_beams"].ours < 10_000
    answered = world.service.get("/v1/model").body["requests"]["answered"] - before
    assert answered >= 0.5 * results["answers_per_second_under_overload"].ours
    # Forty a second are no overload for long: all are answered, or refused in order.
    assert results["overload"].ours == 40
    assert 0 <= results["refused_with_429_under_overload"].ours < 1
    assert results["neither_answered_nor_refused_under_overload"].ours == pytest.approx(0)


def test_a_cluster_is_refused(tmp_path: Path) -> None:
    settings = Settings(tmp_path, "", "sqlite://", None, "ray://somewhere:10001")
    with pytest.raises(UsageError, match="this machine alone"):
        serve(settings, ServeOptions(port=0))


def test_a_port_that_is_taken_names_who_has_it(world: World) -> None:
    port = int(world.service.address.rpartition(":")[2])
    with pytest.raises(UsageError, match=rf"--port {port}: the port is taken by process \d+"):
        require_port("127.0.0.1", port)
    assert require_port("127.0.0.1", 0) > 0
    with pytest.raises(UsageError, match="cannot listen there"):
        require_port("192.0.2.1", 0)


def test_versions_that_are_not_there_are_told(world: World, tmp_path: Path) -> None:
    mlflow = connect(settings_of(world.home))
    for name, number, message in (
        ("other", None, "'other': it has no champion"),
        (NAME, "9", "it has no version 9"),
        ("other", "1", "it has no version 1"),
    ):
        with pytest.raises(UsageError, match=message):
            choose(mlflow, name, number, tmp_path)
    chosen = choose(mlflow, NAME, "1", tmp_path)
    assert (chosen.number, chosen.beams) == ("1", EVALUATED_BEAMS)
    mlflow.MlflowClient().delete_registered_model_alias(NAME, "champion")
    said = f"(?s)no champion yet: only {NAME}.*reelflow run recommend"
    with pytest.raises(UsageError, match=said):
        serve(settings_of(world.home), ServeOptions(port=0))


def test_each_replica_is_given_one_gpu_or_none(world: World, tmp_path: Path) -> None:
    for gpu, device in ((True, "cuda"), (False, "cpu")):
        options = ServeOptions(NAME, "1", gpu=gpu)
        deployed = _deployed(settings_of(world.home), options, tmp_path)
        assert deployed.device == device
        bound = _application(deployed, 2)._bound_deployment
        assert bound.ray_actor_options["num_gpus"] == int(gpu)


def test_a_version_of_other_code_is_served_only_if_the_code_of_now_answers_alike(
    world: World, tmp_path: Path
) -> None:
    mlflow = connect(settings_of(world.home))
    # Comments and names may have changed since; that answers are the same is found by asking.
    number = register(world.home, tmp_path / "model", world.files, {"model_digest": "another"})
    assert choose(mlflow, NAME, number, tmp_path / "fetched").number == number
    memory = tmp_path / "model" / "code" / "components" / "training" / "onerec" / "memory.py"
    memory.write_text(memory.read_text().replace("SCORE_GAIN = 10.0", "SCORE_GAIN = 5.0"))
    with pytest.raises(StageError, match=f"{NAME} version {number}: .* answers otherwise"):
        choose(mlflow, NAME, number, tmp_path / "fetched")
    artifacts = tmp_path / "model" / "artifacts"
    (artifacts / "recommender" / "model.pkl").write_bytes(b"")
    with pytest.raises(CorruptArtifactError, match=r"'model.pkl' is not read"):
        choose(mlflow, NAME, number, tmp_path / "fetched")


def test_a_version_of_before_is_refused_and_the_remedy_is_a_new_one(
    world: World, tmp_path: Path
) -> None:
    """One that does not say which codes its items had; one that carries no encoder of items."""
    mlflow = connect(settings_of(world.home))
    number = register(world.home, tmp_path / "model", world.files, {"model_digest": "before"})
    artifacts = tmp_path / "model" / "artifacts"
    file = artifacts / "recommender" / "config.json"
    config = json.loads(file.read_text())
    del config["semantic_ids_codes"]
    file.write_text(json.dumps(config))
    remedy = "register a newly trained one: reelflow run recommend"
    with pytest.raises(CorruptArtifactError, match=f"(?s)before models said so.*{remedy}"):
        choose(mlflow, NAME, number, tmp_path / "fetched")
    # Of a time when an event told less.
    shutil.copy(world.files["recommender"] / "config.json", file)
    weights = artifacts / "recommender" / "model.safetensors"
    arrays = load_file(weights)
    name = next(name for name in arrays if name.endswith("feedback"))
    save_file(arrays | {name: arrays[name][:-1].copy()}, weights)
    with pytest.raises(CorruptArtifactError, match=f"(?s)not those of the model of now.*{remedy}"):
        choose(mlflow, NAME, number, tmp_path / "fetched")
    shutil.rmtree(artifacts / "item_encoder")
    with pytest.raises(CorruptArtifactError, match=f"(?s)'item_encoder' is missing.*{remedy}"):
        choose(mlflow, NAME, number, tmp_path / "fetched")


def test_sigterm_answers_what_waits_and_leaves_no_process(world: World) -> None:
    slow = {"requests": [{"history": [ONE]}] * 64, "beams": 1024, "deadline_ms": 60_000}
    replies: list[Reply] = []
    caller = threading.Thread(
        target=lambda: replies.append(world.service.post("/v1/recommend", slow))
    )
    caller.start()
    wait_for(lambda: world.service.get("/v1/model").body["waiting"])
    started = world.service.started()
    assert len(started) >= 4
    world.service.process.send_signal(signal.SIGTERM)
    late: set[int] = set()
    patient = {"history": [ONE], "deadline_ms": 60_000}
    with suppress(OSError):
        while True:
            late.add(world.service.post("/v1/recommend", patient).status)
    assert world.service.end() == 0
    caller.join(20)
    assert [reply.status for reply in replies] == [200]
    # Whoever still calls is told that it ends, up to the moment when nobody listens.
    assert late in ({503}, {200, 503})
    assert [process for process in started if process.is_running()] == []
    assert list((world.home / "serving" / "running").iterdir()) == []
