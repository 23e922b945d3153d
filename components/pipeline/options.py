"""Options that several commands share, and the names that the shell completes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from components.pipeline.errors import ReelflowError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from components.pipeline.runner import Runner
    from components.pipeline.settings import Settings


def flows() -> list[str]:
    """Names of all flows, without importing one."""
    folder = Path(__file__).resolve().parent.parent.parent / "flows"
    return [f.stem for f in sorted(folder.glob("*.py")) if "FLOW = Flow(" in f.read_text()]


def flow_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Flows."""
    return [n for n in flows() if n.startswith(incomplete)]


def stage_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Stages."""
    from components.pipeline.stage import load_registry

    return [n for n in sorted(load_registry()) if n.startswith(incomplete)]


def profile_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Sizes."""
    from components.pipeline import params

    return [n for n in params.profile_names() if n.startswith(incomplete)]


def param_paths(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Parameters, as ``--set`` wants them."""
    from components.pipeline.params import parameter_paths
    from components.pipeline.stage import load_registry

    return [p + "=" for p in parameter_paths(load_registry()) if p.startswith(incomplete)]


def report_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Keys of the reports in the store, newest first."""
    from components.pipeline.reports import LATEST, STAGE
    from components.pipeline.runner import open_store

    keys = [LATEST]
    # A store that cannot be read has nothing to offer; the command itself says why.
    with suppress(ReelflowError):
        keys += [m.key for m in open_store(settings_for(ctx.params.get("store"))).manifests(STAGE)]
    return [key for key in keys if key.startswith(incomplete)]


def lineage_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Stages, artifacts and metrics of the store; models are not, asking for them takes seconds."""
    from components.pipeline.lineage import names
    from components.pipeline.runner import open_store

    with suppress(ReelflowError):
        store = open_store(settings_for(ctx.params.get("store")))
        return [n for n in names(store.manifests()) if n.startswith(incomplete)]
    return []


def source_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The simulator, or a folder of data."""
    simulator = [CompletionItem("simulator")] if "simulator".startswith(incomplete) else []
    return [*folder_names(ctx, param, incomplete), *simulator]


def folder_names(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Folders, which the shell itself looks for."""
    return [CompletionItem(incomplete, type="dir")]


def settings_for(store: str | None) -> Settings:
    """The addresses in force; from here on the tools they name are quiet and stay inside home."""
    from components.pipeline.settings import load_settings, prepare_environment

    if store is not None and not store.strip():
        remedy = "give a folder or s3://bucket/prefix, or leave the option out"
        raise UsageError("names no folder", where='--store ""', remedy=remedy)
    settings = load_settings(store)
    prepare_environment(settings)
    return settings


store_option = click.option(
    "--store",
    metavar="URI",
    shell_complete=folder_names,
    help="Artifact store: a folder or s3://bucket/prefix.",
)


@dataclass(frozen=True)
class Choices:
    """The options of every command that runs or explains stages."""

    data: str | None
    store: str | None
    profile: str | None
    overrides: tuple[str, ...]
    params_file: Path | None

    def settings(self) -> Settings:
        """The addresses in force."""
        return settings_for(self.store)

    def runner(self) -> Runner:
        """A runner with these choices."""
        from components.pipeline.runner import Runner, open_store

        settings = self.settings()
        return Runner(settings, open_store(settings), self.params())

    def changed(self) -> dict[str, Any]:
        """Parameters by stage, as JSON values, where they are not the defaults of the models."""
        changed = {
            name: section.model_dump(mode="json", exclude_defaults=True)
            for name, section in self.params().items()
        }
        return {name: section for name, section in changed.items() if section}

    def params(self) -> dict[str, BaseModel]:
        """The parameters in force, by stage."""
        from components.pipeline.params import load_params
        from components.pipeline.stage import load_registry

        # As JSON, which is YAML too: a path may hold signs that mean something to YAML.
        source = [] if self.data is None else [f"ingest.source={json.dumps(_absolute(self.data))}"]
        return load_params(
            load_registry(),
            file=self.params_file,
            profile=self.profile,
            overrides=(*self.overrides, *source),
        )


def _absolute(uri: str) -> str:
    """A local folder by its full path, so that the run means the same from any folder."""
    remedy = "give a folder or s3:// prefix of tables"
    if not uri.strip():
        remedy += "; without --data the simulator makes some"
        raise UsageError("names no folder", where='--data ""', remedy=remedy)
    from components.pipeline.storage import parse_uri

    scheme, place = parse_uri(uri)
    if scheme == "s3":
        return uri
    if not Path(place).exists():
        raise UsageError("no such folder", where=f"--data {uri}", remedy=remedy)
    return place


def choices(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of ``Choices``; the command receives them as its first argument."""

    @functools.wraps(command)
    def chosen(
        data: str | None,
        store: str | None,
        profile: str | None,
        overrides: tuple[str, ...],
        params_file: Path | None,
        **rest: Any,
    ) -> None:
        command(Choices(data, store, profile, overrides, params_file), **rest)

    options = (
        click.option(
            "--data",
            metavar="URI",
            shell_complete=folder_names,
            help="Your data: a folder or s3:// prefix of tables.",
        ),
        store_option,
        click.option(
            "--profile",
            metavar="NAME",
            shell_complete=profile_names,
            help="Another size, over params.yaml: laptop, h200, cluster, or a YAML file.",
        ),
        click.option(
            "--set",
            "overrides",
            metavar="STAGE.KEY=VALUE",
            multiple=True,
            shell_complete=param_paths,
            help="One parameter, over all else; may be given several times.",
        ),
        click.option(
            "--params",
            "params_file",
            type=click.Path(dir_okay=False, path_type=Path),
            help="Parameter file.  [default: ./params.yaml]",
        ),
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), chosen)
