"""What leaves the machine, and what is written down

A run, its report, the pages and DVC in a network that writes down every packet that tries to
leave; credentials in the environment, looked for afterwards in everything that was written.
"""

from __future__ import annotations

import base64
import gzip
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command_line import REELFLOW, ROOT, environment, settings
from confined import Done, q, run_script
from fault_suite import LONG, Record
from outside import require_tunnel, seen, trap
from secrets_search import CommandLines, forms, holds, search
from smallest_run import SMALL

# Signs that addresses quote, so that both forms are looked for.
SECRETS = {
    name: f"{word}/5ecret+{number}of{word}"
    for number, (name, word) in enumerate(
        {
            "AWS_SECRET_ACCESS_KEY": "aluminium",
            "AWS_SESSION_TOKEN": "tokamaks",
            "PREFECT_API_KEY": "porcupine",
            "MLFLOW_TRACKING_PASSWORD": "marmalade",
            "GITHUB_TOKEN": "gingerbread",
            "DATABASE_PASSWORD": "dandelion",
            "password of an address": "albatross",
        }.items()
    )
}
PASSWORD = quote(SECRETS["password of an address"], safe="")
PLANTED = {name: value for name, value in SECRETS.items() if name.isupper()}
PLANTED |= {"MLFLOW_TRACKING_USERNAME": "somebody", "AWS_ACCESS_KEY_ID": "test"}
PLANTED |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}

FLOW = ["run", "recommend", *SMALL]
FLOW += settings(train_recommender__max_steps=20, train_recommender__evaluate_every=10)
S3_PORT = 5599


@dataclass
class World:
    """What happened in the trap.

    Attributes:
        done: the commands by name.
        left: destinations of packets that left, and of those that the control sent.
        wrote: folders with all that was written.
        commands: command lines of all processes.
    """

    home: Path
    done: dict[str, Done]
    left: list[str]
    control: list[str]
    wrote: list[Path]
    commands: set[bytes]


def commands(folder: Path) -> dict[str, str]:
    """The commands that run in the trap, in order, as lines of a script."""
    reelflow = " ".join(map(q, REELFLOW))
    broken = folder / "broken"
    broken.mkdir()
    pq.write_table(pa.table({"user_id": [1]}), broken / "interactions.parquet")
    flow, small = f"{reelflow} {' '.join(map(q, FLOW))}", " ".join(map(q, SMALL))
    # Nobody listens there.
    server, database = f"http://me:{PASSWORD}@127.0.0.1:9/api", f"me:{PASSWORD}@127.0.0.1:9/mlflow"
    found = {
        "flow": flow,
        "report": f"{reelflow} report",
        "explain": f"{reelflow} explain split {small}",
        "doctor": f"{reelflow} doctor",
        "doctor of addresses": f"env PREFECT_API_URL={q(server)} "
        f"MLFLOW_TRACKING_URI={q('postgresql://' + database)} {reelflow} doctor --json",
        "broken data": f"{reelflow} stage ingest --data {q(broken)}",
        "no tracking": f"env MLFLOW_TRACKING_URI={q('http://' + database)} "
        f"MLFLOW_HTTP_REQUEST_MAX_RETRIES=0 {reelflow} stage ingest --force {small}",
        "gc": f"{reelflow} gc --older-than 0h --yes",
    }
    if LONG:
        s3 = f"AWS_ENDPOINT_URL=http://127.0.0.1:{S3_PORT}"
        page = Path(__file__).parent / "pages_in_the_trap.py"
        found |= {
            "flow on S3": f"env {s3} {flow} --store s3://trapped/store",
            "no Prefect": f"env PREFECT_API_URL={q(server)} {flow} --force",
            "pages": f"{q(sys.executable)} {q(page)}",
        }
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> World:
    folder = tmp_path_factory.mktemp("leaks")
    home, packets = folder / "home", folder / "packets.jsonl"
    home.mkdir()
    lines = commands(folder)
    require_tunnel()
    script = trap(folder, packets)
    if LONG:
        moto = f"from moto.server import main; main(['-H127.0.0.1', '-p{S3_PORT}'])"
        bucket = f"boto3.client('s3', endpoint_url='http://127.0.0.1:{S3_PORT}')"
        script += f"{q(sys.executable)} -c {q(moto)} >/dev/null 2>&1 &\nends=$ends,$!\n"
        script += "sleep 5\n"
        make = f"import boto3; {bucket}.create_bucket(Bucket='trapped')"
        script += f"{q(sys.executable)} -c {q(make)}\n"
    script += "".join(f"run {line}\n" for line in lines.values())
    # What the trap sees if somebody does ask outside.
    control = (
        "import socket; socket.setdefaulttimeout(1)\n"
        "for ask in (lambda: socket.getaddrinfo('telemetry.example', 443),\n"
        "            lambda: socket.create_connection(('198.51.100.7', 443)),\n"
        "            lambda: socket.create_connection(('2001:db8:1::7', 443))):\n"
        "    try: ask()\n"
        "    except OSError: pass\n"
    )
    script += f"cp {q(packets)} {q(folder / 'before')}\n"
    script += f"{q(sys.executable)} -c {q(control)}\nsleep 0.5\n"
    env = {**environment(home), **PLANTED}
    env["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    # The path of a socket may not be long.
    ray = Path(tempfile.mkdtemp(prefix="ray-"))
    env["RAY_TMPDIR"] = str(ray)
    with CommandLines(home) as watched:
        done = run_script(script, folder / "said", env, ("mount", "net"), len(lines))
    yield World(
        home=home,
        done=dict(zip(lines, done, strict=True)),
        left=seen(folder / "before"),
        control=seen(packets),
        wrote=[home, folder / "said", ray],
        commands=watched.seen,
    )
    shutil.rmtree(ray, ignore_errors=True)


@pytest.mark.slow
def test_everything_works_without_a_network(world: World, record: Record) -> None:
    for name in ("flow", "report", "explain", "doctor", "gc"):
        assert world.done[name].code == 0, (name, world.done[name])
    assert world.done["broken data"].code == 3
    assert world.done["no tracking"].code == 4
    assert world.done["doctor of addresses"].code == 4
    if LONG:
        assert world.done["flow on S3"].code == 0, world.done["flow on S3"].err
        assert world.done["no Prefect"].code == 4
        assert world.done["pages"].code == 0, world.done["pages"].err
    record("a network that leads nowhere", "completed", len(world.done))


def test_no_packet_leaves_the_machine(world: World, record: Record) -> None:
    # The trap does see whoever asks.
    assert any("telemetry.example" in line for line in world.control)
    assert "TCP 198.51.100.7:443" in world.control
    assert world.left == []
    record("packets that left while everything ran", "none")


def test_no_credential_is_written_down(world: World, record: Record) -> None:
    assert search(world.wrote, SECRETS) == []
    record("credentials in files, databases, logs and messages", "none", len(SECRETS))


def test_no_credential_is_part_of_a_command(world: World, record: Record) -> None:
    # The commands of the platform, its servers and Ray's daemons were all seen.
    said = b"\n".join(world.commands)
    for part in (b"components.pipeline.cli", b"prefect", b"raylet", b"gcs_server"):
        assert part in said
    wanted = {name: forms(secret) for name, secret in SECRETS.items()}
    # The script of this test gives them to `env`.
    ours = [c for c in world.commands if c.split(b"\0")[0] not in (b"env", b"sh")]
    assert [line for line in ours if holds(line, wanted)] == []
    record("credentials in command lines", "none", len(ours))


@pytest.mark.parametrize("name", ["raw", "address", "base64", "gzip", "sqlite", "parquet"])
def test_the_search_finds_what_is_there(name: str, tmp_path: Path) -> None:
    import sqlite3

    secret = SECRETS["GITHUB_TOKEN"]
    file = tmp_path / "file"
    match name:
        case "raw":
            file.write_text(f"x{secret}y")
        case "address":
            file.write_text(f"http://me:{quote(secret, safe='')}@host/")
        case "base64":
            file.write_bytes(base64.b64encode(f"user:{secret}".encode()))
        case "gzip":
            file.write_bytes(gzip.compress(secret.encode()))
        case "sqlite":
            database = sqlite3.connect(file)
            database.execute("CREATE TABLE t (v TEXT)")
            # Longer than a page, so that it lies there in pieces.
            database.execute("INSERT INTO t VALUES (?)", ("x" * 4050 + secret + "y" * 4000,))
            database.commit()
            database.close()
        case "parquet":
            pq.write_table(pa.table({"v": [secret] * 3}), file, compression="zstd")
    assert search([tmp_path], SECRETS) == [f"GITHUB_TOKEN in {file}"]


@pytest.mark.skipif(not LONG, reason="minutes; part of make faults")
def test_dvc_asks_nobody(tmp_path: Path, record: Record) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("components", "flows", ".dvc"):
        ignored = shutil.ignore_patterns("__pycache__", "tmp", "cache")
        shutil.copytree(ROOT / name, clone / name, ignore=ignored)
    for name in ("params.yaml", "dvc.yaml", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, clone / name)
    file = clone / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params["ingest"]["simulator"] |= {"interactions": 6000, "render_videos": False}
    file.write_text(yaml.safe_dump(params, sort_keys=False))
    require_tunnel()
    packets = tmp_path / "packets.jsonl"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    env = {**environment(clone / ".platform"), **PLANTED, "PYTHONPATH": str(clone), "PATH": path}
    script = f"""
{trap(tmp_path, packets)}
cd {q(clone)}
git init -q
git add -A
run dvc repro split
"""
    (done,) = run_script(script, tmp_path / "said", env, ("mount", "net"), 1)
    assert done.code == 0, done.err
    assert seen(packets) == []
    assert search([clone, tmp_path / "said"], SECRETS) == []
    record("dvc repro", "completed, no packet left, no credential written")
