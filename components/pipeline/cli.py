"""The ``reelflow`` command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import click

from components.pipeline import options, sigterm
from components.pipeline.console import working
from components.pipeline.errors import ReelflowError, StageError, StorageError, UsageError
from components.pipeline.serve_command import serve_command

if TYPE_CHECKING:
    from components.pipeline.runner import Runner, Step


class Group(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
First steps
  reelflow run recommend                     everything, on a simulated platform
  reelflow run recommend --data FOLDER       the same on your own tables
  reelflow run recommend --plan              what would run, what is cached, and why
  reelflow run recommend --set seed=1 --set train_recommender.epochs=2
  reelflow report --open                     what came out
\b
The same command again resumes: finished stages are cached, training continues from its
last checkpoint. Every command has --help. Tab completion (bash, zsh, fish):
  eval "$(_REELFLOW_COMPLETE=bash_source reelflow)"
\b
Exit codes: 0 done, 2 usage or params, 3 data contract broken, 4 stage failed, 130 interrupted.""",
)
@click.version_option(package_name="reelflow", prog_name="reelflow")
def cli() -> None:
    """The model factory of a short-video platform: curate, train, compress, evaluate."""


class RunCommand(click.Command):
    """Its help names the flows there are."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Flows"):
            formatter.write_text(", ".join(options.flows()))
        super().format_epilog(ctx, formatter)


@cli.command("run", cls=RunCommand, short_help="Run a flow; what is done already is not redone.")
@click.argument("flow", shell_complete=options.flow_names)
@options.choices
@click.option(
    "--from",
    "start",
    metavar="STAGE",
    shell_complete=options.stage_names,
    help="First stage to run; those above it must be there.",
)
@click.option(
    "--until", metavar="STAGE", shell_complete=options.stage_names, help="Last stage to run."
)
@click.option("--force", is_flag=True, help="Run the stages even if they are cached.")
@click.option("--plan", is_flag=True, help="Say what would run and why; run nothing.")
@click.option(
    "--timeout",
    metavar="MINUTES",
    type=click.FloatRange(0, 60 * 24 * 30, min_open=True),
    help="End a stage that takes longer.  [default: a day]",
)
@click.option(
    "--retries",
    metavar="N",
    type=click.IntRange(0, 10),
    help="Try a stage again whose process died or took too long.  [default: 2]",
)
def run_command(
    choices: options.Choices,
    flow: str,
    start: str | None,
    until: str | None,
    force: bool,
    plan: bool,
    timeout: float | None,
    retries: int | None,
) -> None:
    """Run FLOW, a chain of stages that ends in a registered model and a report.

    A stage whose code, params and inputs are unchanged is taken from the store, so the same
    command again resumes, whatever ended the last one.

    \b
    reelflow run recommend --data s3://bucket/tables
    reelflow run recommend --plan --set split.protocol=temporal
    reelflow run recommend --from train_recommender --force
    """
    from components.pipeline.flow import find_flow
    from components.pipeline.runner import slice_flow

    found = find_flow(flow)
    runner = choices.runner()
    stages = slice_flow(found, start, until)
    if start is not None:
        runner.resolve_upstream(stages[0])
    forced = frozenset(s.name for s in stages) if force else frozenset()
    steps = runner.plan(stages, forced)
    if plan:
        _show_plan(steps)
        return
    if all(step.status == "cached" for step in steps):
        # Nothing to do: no server, no cluster, no tracker is started to find that out.
        for step in steps:
            click.echo(f"  {step.stage.name:<22} cached")
    else:
        from components.pipeline.hardware import require_hardware

        due = [step.stage for step in steps if step.status != "cached"]
        require_hardware(due, runner.params, runner.settings)
        # What it says about a failure goes to its pages; here one message at the end suffices.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
        from components.pipeline.prefect_server import prefect_server

        with working(found.name):
            with prefect_server(runner.settings):
                from components.pipeline.prefect_flow import run_flow
            run_flow(
                found,
                runner,
                start=start,
                until=until,
                force=force,
                stage_timeout_minutes=timeout,
                retries=retries,
            )
    _show_outcome(runner)


@cli.command("stage", short_help="Run one stage, as dvc.yaml does.")
@click.argument("name", shell_complete=options.stage_names)
@options.choices
@click.option("--force", is_flag=True, help="Run even if it is cached.")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="Also put the outputs into this folder (as dvc.yaml does).",
)
@click.option(
    "--outside",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Run nothing; write which data outside the stage reads, as a digest, into this file.",
)
def stage_command(
    choices: options.Choices, name: str, force: bool, export: Path | None, outside: Path | None
) -> None:
    """Run the stage NAME; what it reads must have been made before, with the same params.

    \b
    reelflow stage split --set split.max_history=100
    """
    from components.pipeline.stage import find_stage

    stage = find_stage(name)
    runner = choices.runner()
    if outside is not None:
        from components.pipeline.dvc import write_outside
        from components.pipeline.runner import external_digest

        write_outside(external_digest(stage, runner.params[name]), outside)
        return
    from components.pipeline.dvc import adopt

    if export is not None:
        adopt(runner, stage, export)
    runner.resolve_upstream(stage)
    manifest = None if force else runner.cached(stage)
    if manifest is None:
        from components.pipeline.hardware import require_hardware
        from components.pipeline.presence import announced
        from components.pipeline.tracking import FlowTracker, execute_tracked

        require_hardware([stage], runner.params, runner.settings)
        tags = {"store": runner.store.uri}
        with (
            working(name),
            announced(runner.settings, runner.store, name),
            FlowTracker(runner.settings, "stages", tags) as tracker,
        ):
            # What was there a moment ago may have been freed before gc knew of this command.
            runner.done.clear()
            if export is not None:
                adopt(runner, stage, export)
            manifest, _ = execute_tracked(runner, stage, tracker, force)
        click.echo(f"  {stage.name:<22} {manifest.body['seconds']:.1f} s")
    else:
        click.echo(f"  {stage.name:<22} cached")
    if export is not None:
        from components.pipeline.dvc import export as export_outputs

        export_outputs(runner.store, manifest, export)
    for metric, value in manifest.metrics.items():
        click.echo(f"    {metric} = {value:.6g}")


@cli.group("data", cls=Group)
def data_group() -> None:
    """List what can be read; turn data into tables."""


@data_group.command("list")
def data_list() -> None:
    """Formats that can be read, and the files each needs."""
    from components.data.source import list_formats

    for entry in list_formats():
        click.echo(f"{entry.name:<12} {entry.files}")
        if entry.citation:
            click.echo(f"{'':<12} {entry.citation}")


@data_group.command("prepare", short_help="Write the tables of a data folder, or simulated ones.")
@click.argument("name", shell_complete=options.source_names)
@click.argument("out", metavar="[FOLDER]", default="", shell_complete=options.folder_names)
def data_prepare(name: str, out: str) -> None:
    """Write the contract tables of NAME into FOLDER, ready for `reelflow run --data FOLDER`.

    NAME is a folder in a format of `reelflow data list`, or `simulator`. Without FOLDER the
    tables go to NAME-tables in the current folder.

    \b
    reelflow data prepare ml-1m
    reelflow data prepare simulator /tmp/platform
    """
    from components.data.source import prepare

    out = out or f"{name.rstrip('/').rpartition('/')[2]}-tables"
    click.echo(f"  {out}")
    with working(name):
        counts = prepare(name, out)
    for table, rows in counts.items():
        click.echo(f"  {table:<14} {rows:>12,} rows")


def _bench_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from benchmarks.runner import list_benchmarks

    return [name for name in list_benchmarks() if name.startswith(incomplete)]


@cli.command("bench", short_help="Measure a claim of docs/results.md.")
@click.argument("name", required=False, shell_complete=_bench_names)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option("--quick", is_flag=True, help="Small sizes: a check that it runs, not a figure.")
def bench_command(name: str | None, as_json: bool, quick: bool) -> None:
    """Measure the claim NAME of docs/results.md, ours beside the alternative.

    Without NAME, list the benchmarks.

    \b
    reelflow bench constrained_beam --json > figures.json
    """
    from benchmarks.runner import list_benchmarks, run_benchmark

    if name is None:
        for bench, summary in list_benchmarks().items():
            click.echo(f"  {bench:<22} {summary}")
        return
    run_benchmark(name, as_json=as_json, quick=quick)


@cli.command("ui", short_help="Start Prefect, MLflow and a worker for the deployments.")
@options.choices
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(1),
    help="Runs at once on this machine.  [default: one for every two cores]",
)
def ui_command(choices: options.Choices, limit: int | None) -> None:
    """Start Prefect, MLflow and a worker, and print the addresses.

    Flows can then be started from a form, and run every night. A server whose address is given
    (PREFECT_API_URL, MLFLOW_TRACKING_URI) is used instead of starting one. What the options and
    params.yaml say is what the form begins with. Ctrl-C ends all of it; a run that it interrupts
    goes on when it is started again.
    """
    from components.pipeline.ui import serve

    serve(choices.settings(), "flows.deployments", choices.changed(), limit)


cli.add_command(serve_command)


@cli.command("report", short_help="Print the path of the HTML report of a run.")
@click.argument("run", default="latest", shell_complete=options.report_names)
@options.store_option
@click.option("--open", "open_it", is_flag=True, help="Open it in the browser.")
def report_command(run: str, store: str | None, open_it: bool) -> None:
    """Print the path of the HTML report of RUN: `latest` or (the start of) a report's key."""
    from components.pipeline.reports import find_report
    from components.pipeline.runner import open_store

    path = find_report(open_store(options.settings_for(store)), run)
    click.echo(path)
    if open_it:
        click.launch(str(path))


@cli.command("explain", short_help="Why a stage would run, or would not.")
@click.argument("stage", shell_complete=options.stage_names)
@options.choices
def explain_command(choices: options.Choices, stage: str) -> None:
    """Why STAGE would or would not run: which code, parameter or input changed."""
    from components.pipeline.explain import explain
    from components.pipeline.stage import find_stage

    runner = choices.runner()
    for line in explain(runner, find_stage(stage)):
        click.echo(line)


@cli.command("lineage", short_help="What a result was made from, and what was made from it.")
@click.argument("name", metavar="ARTIFACT|MODEL|METRIC", shell_complete=options.lineage_names)
@options.store_option
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def lineage_command(name: str, store: str | None, as_json: bool) -> None:
    """What a result was made from, and what was made from it, both to the end.

    It is named by an artifact or a stage (the newest is taken), by the start of a manifest key or
    digest (of data from outside too), by a registered model, or by a metric.

    \b
    reelflow lineage recommender
    reelflow lineage recommender-simulator@champion
    reelflow lineage evaluate_recommender.ndcg_at_10 --json
    """
    from components.pipeline.lineage import trace
    from components.pipeline.lineage_answer import lines, to_json
    from components.pipeline.runner import open_store

    settings = options.settings_for(store)
    answer = trace(open_store(settings), settings, name)
    if as_json:
        click.echo(json.dumps(to_json(answer), indent=1, ensure_ascii=False))
        return
    for line in lines(answer):
        click.echo(line)


@cli.command("doctor", short_help="What is chosen on this machine, what is wrong, the remedy.")
@options.store_option
@click.option("--json", "as_json", is_flag=True, help="One JSON list on standard output.")
def doctor_command(store: str | None, as_json: bool) -> None:
    """What was chosen on this machine and why, what is wrong, and how to mend it.

    It takes seconds and changes nothing. A line with ✗ keeps the platform from working (exit
    code 4), one with ! deserves a look; the remedy stands below.
    """
    from components.pipeline.doctor import examine

    findings = examine(options.settings_for(store))
    if as_json:
        click.echo(json.dumps([f.as_json() for f in findings], indent=1, ensure_ascii=False))
    for finding in [] if as_json else findings:
        click.echo(f"  {finding.mark} {finding.subject:<16} {finding.text}")
        if finding.remedy:
            click.echo(f"    {'':<16} remedy: {finding.remedy}")
    if any(f.broken for f in findings):
        sys.exit(StageError.exit_code)


@cli.command("gc", short_help="Free disk: what nothing needs any more.")
@options.store_option
@click.option(
    "--older-than",
    metavar="AGE",
    default="7d",
    show_default=True,
    help="Keep what is younger: 12h, 7d, 4w.",
)
@click.option("--yes", is_flag=True, help="Delete; without it, only say what would go.")
def gc_command(store: str | None, older_than: str, yes: bool) -> None:
    """Free disk: files of killed runs, and old results that nothing needs any more.

    Always kept are the newest result of every stage, all it was made from, and all that a
    registered model was made from, also one in the registry of another home; while a run goes on,
    here or on another machine that shares the store, every result is kept.

    \b
    unpublished   files of killed, failed or replaced executions, after an hour
                  (a day in a store outside REELFLOW_HOME)
    result        results older than AGE that nothing needs
    scratch       checkpoints of stages that nobody resumed within AGE
    fetched copy  local copies of objects, not used within AGE
    ray session   logs of Ray clusters that ended, older than AGE
    lock          lock files of killed processes
    reference     what a model version needed that is not in its registry any more

    What Prefect and MLflow recorded stays: it is history, and small. A gc that is killed leaves a
    whole store; the next one goes on.
    """
    from components.pipeline.gc import collect

    for line in collect(options.settings_for(store), older_than, delete=yes):
        click.echo(line)


def _show_plan(steps: list[Step]) -> None:
    words = {"cached": "cached", "run": "would run", "waits": "would follow"}
    for step in steps:
        click.echo(f"  {step.stage.name:<22} {words[step.status]:<13} {step.reason}")


def _show_outcome(runner: Runner) -> None:
    evaluation = runner.done.get("evaluate_recommender")
    if evaluation is not None:
        for name in ("ndcg_at_10", "hr_at_10"):
            if name in evaluation.metrics:
                click.echo(f"  {name} = {evaluation.metrics[name]:.4f}")
    report = runner.done.get("report")
    if report is not None:
        from components.pipeline.artifacts import Input

        click.echo(f"  report: {Input(runner.store, 'report', report).path('report.html')}")


def main() -> None:
    """Entry point: runs a command and turns errors into one message and an exit code."""
    _speak_utf8()
    try:
        # A job that a scheduler ends must end like one that a person ends.
        with sigterm.as_interrupt():
            _require_current_folder()
            cli.main(prog_name="reelflow", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted: the same command resumes", err=True)
        sys.exit(sigterm.INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except ReelflowError as error:
        if isinstance(error, StageError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=sys.stderr)
        click.echo(f"error: {error}", err=True)
        _say_if_a_disk_is_full(error)
        sys.exit(error.exit_code)
    except Exception as error:
        from components.pipeline.refusals import refusal
        from components.pipeline.settings import load_settings

        refused = refusal(error, "cannot go on", load_settings())
        if refused is None:
            raise
        click.echo(f"error: {refused}", err=True)
        sys.exit(refused.exit_code)


def _require_current_folder() -> None:
    """Everything that is given or written by a relative path would fail in a way of its own.

    Raises:
        UsageError: the folder was removed while the shell stood in it.
    """
    try:
        Path.cwd()
    except FileNotFoundError:
        raise UsageError(
            "the current folder was removed",
            where=os.environ.get("PWD", "."),
            remedy="change to a folder that is there: cd",
        ) from None


def _speak_utf8() -> None:
    """Start anew in UTF-8 mode where the locale says ASCII or Latin: Arrow and Ray take UTF-8 only.

    By the environment, so that every process that is started from here does the same.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() == "utf-8":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _say_if_a_disk_is_full(error: ReelflowError) -> None:
    """A server that cannot write only says that it fails; the disk tells why."""
    if not isinstance(error, StorageError):
        return
    from components.pipeline.refusals import FULL, full_disk, remedy
    from components.pipeline.settings import load_settings

    settings = load_settings()
    folder = full_disk(settings)
    if folder is not None and FULL not in str(error):
        click.echo(f"  {folder}: {FULL}\n  remedy: {remedy(FULL, folder, settings)}", err=True)


if __name__ == "__main__":
    main()
