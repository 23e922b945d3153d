"""The ``reelflow`` command line. Nothing heavy is imported until a command needs it."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from components.pipeline.errors import ReelflowError, StageError, UsageError

if TYPE_CHECKING:
    from components.pipeline.runner import Runner, Step

INTERRUPTED = 130


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
  reelflow run recommend --set train_recommender.model.d_model=64
\b
The same command again resumes: finished stages are cached, training continues from its
last checkpoint. Tab completion: eval "$(_REELFLOW_COMPLETE=bash_source reelflow)".
\b
Exit codes: 0 done, 2 usage or params, 3 data contract broken, 4 stage failed, 130 interrupted.""",
)
@click.version_option(package_name="reelflow", prog_name="reelflow")
def cli() -> None:
    """The model factory of a short-video platform: curate, train, compress, evaluate."""


def _flow_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    flows = Path(__file__).resolve().parent.parent.parent / "flows"
    names = (f.stem for f in sorted(flows.glob("*.py")) if "FLOW = Flow(" in f.read_text())
    return [n for n in names if n.startswith(incomplete)]


def _stage_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from components.pipeline.stage import load_registry

    return [n for n in sorted(load_registry()) if n.startswith(incomplete)]


def _profile_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from components.pipeline.params import profile_names

    return [n for n in profile_names() if n.startswith(incomplete)]


def _param_paths(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    from components.pipeline.params import parameter_paths
    from components.pipeline.stage import load_registry

    return [p + "=" for p in parameter_paths(load_registry()) if p.startswith(incomplete)]


_store = click.option(
    "--store", metavar="URI", help="Artifact store: a folder or s3://bucket/prefix."
)
_profile = click.option(
    "--profile",
    metavar="NAME",
    shell_complete=_profile_names,
    help="Overlay a size from infra/profiles (laptop, h200, cluster) or a YAML file.",
)
_set = click.option(
    "--set",
    "overrides",
    metavar="STAGE.KEY=VALUE",
    multiple=True,
    shell_complete=_param_paths,
    help="Override one parameter; may be given several times.",
)
_params = click.option(
    "--params",
    "params_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Parameter file.  [default: ./params.yaml]",
)


@cli.command("run")
@click.argument("flow", shell_complete=_flow_names)
@click.option("--data", metavar="URI", help="Your data: a folder or s3:// prefix of tables.")
@_store
@_profile
@_set
@_params
@click.option("--from", "start", metavar="STAGE", shell_complete=_stage_names, help="Begin here.")
@click.option("--until", metavar="STAGE", shell_complete=_stage_names, help="End here.")
@click.option("--force", is_flag=True, help="Run the stages even if they are cached.")
@click.option("--plan", is_flag=True, help="Say what would run and why; run nothing.")
def run_command(
    flow: str,
    data: str | None,
    store: str | None,
    profile: str | None,
    overrides: tuple[str, ...],
    params_file: Path | None,
    start: str | None,
    until: str | None,
    force: bool,
    plan: bool,
) -> None:
    """Run FLOW; stages whose code, params and inputs are unchanged are taken from the store."""
    from components.pipeline.flow import find_flow
    from components.pipeline.runner import slice_flow

    found = find_flow(flow)
    if data is not None:
        overrides = (*overrides, f"ingest.source={_absolute(data)}")
    runner = _runner(store, profile, overrides, params_file)
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
        from components.pipeline.prefect_flow import run_flow

        run_flow(found, runner, start, until, force)
    _show_outcome(runner)


@cli.command("stage")
@click.argument("name", shell_complete=_stage_names)
@_store
@_profile
@_set
@_params
@click.option("--force", is_flag=True, help="Run even if it is cached.")
@click.option(
    "--export",
    type=click.Path(path_type=Path),
    help="Also put the outputs into this folder (as dvc.yaml does).",
)
def stage_command(
    name: str,
    store: str | None,
    profile: str | None,
    overrides: tuple[str, ...],
    params_file: Path | None,
    force: bool,
    export: Path | None,
) -> None:
    """Run one stage; what it reads must have been made before."""
    from components.pipeline.stage import find_stage

    stage = find_stage(name)
    runner = _runner(store, profile, overrides, params_file)
    runner.resolve_upstream(stage)
    manifest = None if force else runner.cached(stage)
    if manifest is None:
        from components.pipeline.tracking import FlowTracker, execute_tracked

        with FlowTracker(runner.settings, "stages", {"store": runner.store.uri}) as tracker:
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
    """List what can be read; turn a public data set into tables."""


@data_group.command("list")
def data_list() -> None:
    """Formats that can be read, and the files each needs."""
    from components.data.source import list_formats

    for entry in list_formats():
        click.echo(f"{entry.name:<12} {entry.files}")
        click.echo(f"{'':<12} {entry.citation}")


@data_group.command("prepare")
@click.argument("name")
@click.argument("out", metavar="FOLDER")
def data_prepare(name: str, out: str) -> None:
    """Write the contract tables of NAME (a data folder, or `simulator`) into FOLDER."""
    from components.data.source import prepare

    for table, rows in prepare(name, out).items():
        click.echo(f"  {table:<14} {rows:>12,} rows")


@cli.command("bench")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
@click.option("--quick", is_flag=True, help="Small sizes: a check that it runs, not a figure.")
def bench_command(name: str | None, as_json: bool, quick: bool) -> None:
    """Measure a claim of docs/results.md; without NAME, list the benchmarks."""
    from benchmarks.runner import list_benchmarks, run_benchmark

    if name is None:
        for bench, summary in list_benchmarks().items():
            click.echo(f"  {bench:<22} {summary}")
        return
    run_benchmark(name, as_json=as_json, quick=quick)


@cli.command("ui")
@click.option("--store", metavar="URI", help="Artifact store of the runs that are triggered.")
def ui_command(store: str | None) -> None:
    """Start Prefect, MLflow and the deployments; print their addresses; Ctrl-C ends them."""
    from flows.deployments import deployments

    from components.pipeline.ui import serve

    serve(_settings(store), deployments)


@cli.command("report")
@click.argument("run", default="latest")
@_store
@click.option("--open", "open_it", is_flag=True, help="Open it in the browser.")
def report_command(run: str, store: str | None, open_it: bool) -> None:
    """Print the path of the HTML report of RUN: `latest` or (the start of) a report's key."""
    from components.pipeline.reports import find_report
    from components.pipeline.runner import open_store

    path = find_report(open_store(_settings(store)), run)
    click.echo(path)
    if open_it:
        click.launch(str(path))


@cli.command("explain")
@click.argument("stage", shell_complete=_stage_names)
@_store
@_profile
@_set
@_params
def explain_command(
    stage: str,
    store: str | None,
    profile: str | None,
    overrides: tuple[str, ...],
    params_file: Path | None,
) -> None:
    """Why STAGE would or would not run: which code, parameter or input changed."""
    from components.pipeline.explain import explain
    from components.pipeline.stage import find_stage

    runner = _runner(store, profile, overrides, params_file)
    for line in explain(runner, find_stage(stage)):
        click.echo(line)


@cli.command("doctor")
@_store
def doctor_command(store: str | None) -> None:
    """What was chosen on this machine and why, what is wrong, and how to mend it."""
    from components.pipeline.doctor import examine

    findings = examine(_settings(store))
    for finding in findings:
        click.echo(f"  {finding.mark} {finding.subject:<16} {finding.text}")
        if finding.remedy:
            click.echo(f"    {'':<16} remedy: {finding.remedy}")
    if any(f.broken for f in findings):
        sys.exit(StageError.exit_code)


@cli.command("gc")
@_store
@click.option("--older-than", default="7d", show_default=True, help="Age: 12h, 7d, 4w.")
@click.option("--yes", is_flag=True, help="Delete; without it only say what would be deleted.")
def gc_command(store: str | None, older_than: str, yes: bool) -> None:
    """Free disk: files of killed runs, and results that nothing newer or registered needs."""
    from components.pipeline.gc import collect

    for line in collect(_settings(store), older_than, delete=yes):
        click.echo(line)


def _settings(store: str | None) -> Any:
    from components.pipeline.settings import load_settings, prepare_environment

    settings = load_settings(store)
    prepare_environment(settings)
    return settings


def _runner(
    store: str | None, profile: str | None, overrides: tuple[str, ...], params_file: Path | None
) -> Runner:
    from components.pipeline.params import load_params
    from components.pipeline.runner import Runner, open_store
    from components.pipeline.stage import load_registry

    settings = _settings(store)
    params = load_params(load_registry(), file=params_file, profile=profile, overrides=overrides)
    return Runner(settings, open_store(settings), params)


def _absolute(uri: str) -> str:
    """A local folder by its full path, so that the run means the same from any folder."""
    if "://" in uri:
        return uri
    path = Path(uri).expanduser().absolute()
    if not path.exists():
        raise UsageError("no such folder", where=f"--data {uri}", remedy="give a folder of tables")
    return str(path)


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
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("\ninterrupted: the same command resumes", err=True)
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(UsageError.exit_code)
    except ReelflowError as error:
        if isinstance(error, StageError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__, file=sys.stderr)
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
