"""``reelflow serve``: the options of the service."""

from __future__ import annotations

import click

from components.pipeline import options


@click.command("serve", short_help="Serve a registered recommender over HTTP.")
@click.option("--model", metavar="NAME", help="Registered model.  [default: the one champion]")
@click.option("--version", metavar="V", help="Its version.  [default: its champion]")
@click.option("--host", metavar="ADDRESS", default="127.0.0.1", show_default=True)
@click.option(
    "--port",
    metavar="PORT",
    type=click.IntRange(0, 65_535),
    default=8000,
    show_default=True,
    help="0 takes any free one.",
)
@click.option(
    "--replicas",
    metavar="N",
    type=click.IntRange(1, 256),
    default=1,
    show_default=True,
    help="Processes that compute.",
)
@click.option(
    "--threads",
    metavar="N",
    type=click.IntRange(1, 256),
    help="Threads of each replica.  [default: what the machine has room for, 4 at most]",
)
@click.option(
    "--queue",
    metavar="N",
    type=click.IntRange(64, 100_000),
    default=256,
    show_default=True,
    help="Requests that may wait in a replica; more are told to come back.",
)
@click.option("--gpu", is_flag=True, help="Compute on GPUs, one for each replica.")
def serve_command(
    model: str | None,
    version: str | None,
    host: str,
    port: int,
    replicas: int,
    threads: int | None,
    queue: int,
    gpu: bool,
) -> None:
    """Serve a registered recommender until Ctrl-C: POST /v1/recommend, described at /docs.

    New items are taken in while it runs (POST /v1/items) and are there after a restart. It listens
    on this machine alone unless --host says otherwise; it asks nobody who they are, so another
    address wants a gateway in front.

    \b
    reelflow serve
    reelflow serve --model recommender-simulator --version 3 --port 9000
    """
    from components.serving.batching import BatchLimits
    from components.serving.service import ServeOptions, serve

    limits = BatchLimits(waiting=queue)
    chosen = ServeOptions(model, version, host, port, replicas, threads, limits, gpu)
    serve(options.settings_for(None), chosen)
