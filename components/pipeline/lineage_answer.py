"""A lineage in words and lines, and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from components.pipeline.addresses import hide_password
from components.pipeline.explain import flat
from components.pipeline.flow import headline_of
from components.pipeline.lineage import Lineage, Missing, belongs, identity
from components.pipeline.manifest import Manifest
from components.pipeline.stage import load_registry

SHOWN_CHARS = 12
SHOWN_PARAMS, SHOWN_METRICS, SHOWN_EXECUTIONS = 6, 3, 20
GONE = "is not in this store any more: freed by `reelflow gc`, unreadable, or made in another store"


def lines(answer: Lineage) -> Iterator[str]:
    """The answer for a person: what was asked for, above it, below it."""
    if answer.model is not None:
        yield from _model(answer)
    elif answer.metric is not None:
        yield from _metric(answer)
    elif answer.gone is not None:
        yield _short(answer.gone)
    else:
        yield from _execution(answer.executions[0])
        yield from _others(answer)
    if answer.executions:
        yield "made from"
        above = answer.graph.made_from
        yield from _trees(answer, above, label=_short)
    if answer.starts and answer.model is None:
        yield "what was made from it"
        yield from _trees(answer, answer.graph.made_of, label=_short)
        models = answer.models
        if answer.silent:
            yield f"  {answer.silent}"
        below = [*answer.executions[:1], *answer.graph.below(answer.starts[:1])]
        for model in models:
            if any(belongs(model, execution) for execution in below):
                yield f"  model {model.label}"


def _model(answer: Lineage) -> Iterator[str]:
    model = answer.model
    assert model is not None
    yield f"model {model.label}"
    if reason := model.tags.get("gate"):
        yield f"  gate: {reason}"
    if previous := model.tags.get("previous_champion"):
        yield f"  compared with version {previous}"
    for execution in answer.executions:
        yield f"  {_short(execution)}"
    keys = {m.key for m in answer.executions}
    if (key := model.tags.get("manifest_key", "")) not in keys:
        yield f"  the execution that trained it ({key[:SHOWN_CHARS] or 'no key'}) {GONE}"
    measured = model.tags.get("evaluation_digest", "")
    if not any("evaluation" in m.body["outputs"] for m in answer.executions):
        yield f"  the execution that measured it (evaluation {measured[:SHOWN_CHARS]}) {GONE}"


def _metric(answer: Lineage) -> Iterator[str]:
    name = str(answer.metric)
    count = len(answer.executions)
    yield f"metric {name}: {count} execution{'s' if count > 1 else ''}, newest first"
    for execution in answer.executions[:SHOWN_EXECUTIONS]:
        yield f"  {execution.metrics[name]:<10.6g} {_title(execution)}"
        data = [m for m in answer.graph.above([execution]) if isinstance(m, Manifest)]
        told = [_data(m) for m in (execution, *data) if m.body.get("external")]
        below = [execution, *answer.graph.below([execution])]
        told += [
            f"model {model.label}"
            for model in answer.models
            if any(belongs(model, m) for m in below)
        ]
        if told:
            yield f"  {'':<10} {'; '.join(dict.fromkeys(told))}"
    if answer.silent:
        yield f"  {answer.silent}"
    if count > SHOWN_EXECUTIONS:
        yield f"  and {count - SHOWN_EXECUTIONS} older ones"
    if count > 1:
        yield f"of the newest, {_title(answer.executions[0])}:"


def _execution(execution: Manifest) -> Iterator[str]:
    body = execution.body
    yield _title(execution)
    yield f"  key     {execution.key}"
    if "code" in body:
        yield f"  code    {len(body['code'])} modules, digest {body['code_digest'][:SHOWN_CHARS]}"
    for name, value in _changed_params(execution).items():
        yield f"  param   {name} = {value}"
    if body.get("external"):
        yield f"  {_data(execution)}"
    for name, record in body["outputs"].items():
        rows = f", {record['rows']:,} rows" if "rows" in record else ""
        yield f"  output  {name} {record['digest'][:SHOWN_CHARS]}{rows}"
    for name, value in execution.metrics.items():
        yield f"  metric  {name} = {value:.6g}"


def _others(answer: Lineage) -> Iterator[str]:
    others = answer.executions[1:]
    if others:
        yield f"  also {', '.join(_title(m) for m in others[:SHOWN_EXECUTIONS])}"


def _trees(
    answer: Lineage,
    step: Callable[[Manifest | Missing], Iterable[Manifest | Missing]],
    label: Callable[[Manifest | Missing], str],
) -> Iterator[str]:
    """The first execution's (a model's: every one's) neighbours in one direction, as a tree."""
    starts = answer.starts if answer.model is not None else answer.starts[:1]
    first = list({identity(n): n for start in starts for n in step(start)}.values())
    shown = {identity(start) for start in starts}
    found = list(_branches(first, step, label, shown, ""))
    yield from found or ["  nothing"]


def _branches(
    nodes: list[Manifest | Missing],
    step: Callable[[Manifest | Missing], Iterable[Manifest | Missing]],
    label: Callable[[Manifest | Missing], str],
    shown: set[str],
    indent: str,
) -> Iterator[str]:
    for node in nodes:
        last = node is nodes[-1]
        again = identity(node) in shown
        text = f"{_title(node)}, above" if again and isinstance(node, Manifest) else label(node)
        yield f"  {indent}{'└─' if last else '├─'} {text}"
        if again or isinstance(node, Missing):
            continue
        shown.add(identity(node))
        deeper = indent + ("   " if last else "│  ")
        yield from _branches(list(step(node)), step, label, shown, deeper)


def _title(execution: Manifest) -> str:
    made = str(execution.body["created_at"])[:16].replace("T", " ")
    return f"{execution.stage} {execution.key[:SHOWN_CHARS]} of {made}"


def _short(node: Manifest | Missing) -> str:
    """One line: what it is, its data, what is special in its params, its headline metrics."""
    if isinstance(node, Missing):
        return f"{node.artifact} {node.digest[:SHOWN_CHARS]} {GONE}"
    told = [_data(node)] if node.body.get("external") else []
    if "code_digest" in node.body:
        told.append(f"code {node.body['code_digest'][:SHOWN_CHARS]}")
    params = [f"{name}={value}" for name, value in _changed_params(node).items()]
    told += params[:SHOWN_PARAMS]
    if len(params) > SHOWN_PARAMS:
        told.append(f"{len(params) - SHOWN_PARAMS} more params")
    metrics = [n for n in headline_of(node.stage) if n in node.metrics][:SHOWN_METRICS]
    told += [f"{name} = {node.metrics[name]:.6g}" for name in metrics]
    return f"{_title(node)}{': ' if told else ''}{', '.join(told)}"


def _data(execution: Manifest) -> str:
    """The data that an execution read from outside the store."""
    source = execution.body.get("params", {}).get("source")
    named = f" {hide_password(str(source))}" if source else ""
    return f"outside{named}, digest {str(execution.body['external'])[:SHOWN_CHARS]}"


def _changed_params(execution: Manifest) -> dict[str, Any]:
    """Parameters that are not the stage's defaults; all of a stage that is gone from the code."""
    given = flat(execution.body.get("params", {}))
    stage = load_registry().get(execution.stage)
    defaults = flat(stage.params().model_dump(mode="json")) if stage else {}
    unset = object()
    # The address of data may hold a password; it is told with the data.
    return {
        name: value
        for name, value in given.items()
        if defaults.get(name, unset) != value and name != "source"
    }


def to_json(answer: Lineage) -> dict[str, Any]:
    """The answer for a program; executions are named ``stage/key``."""
    graph = answer.graph
    starts = answer.executions
    above = list(graph.above(answer.starts))
    below = list(graph.below(answer.starts))
    missing = [m for m in (answer.gone, *above) if isinstance(m, Missing)]
    met = [*starts, *(m for m in above if isinstance(m, Manifest)), *below]
    models = answer.models
    return {
        "asked": answer.asked,
        "kind": _kind(answer),
        "metric": answer.metric,
        "found": [identity(m) for m in starts],
        "above": [identity(m) for m in above if isinstance(m, Manifest)],
        "below": [identity(m) for m in below],
        "missing": [
            {"artifact": m.artifact, "digest": m.digest, "read_by": identity(m.read_by)}
            for m in missing
        ],
        "executions": {identity(m): _facts(answer, m) for m in met},
        "models": [
            {
                "name": model.name,
                "version": model.version,
                "aliases": list(model.aliases),
                "tags": model.tags,
                "executions": [identity(m) for m in met if belongs(model, m)],
            }
            for model in models
        ],
        "registry": answer.silent or None,
    }


def _kind(answer: Lineage) -> str:
    told = {"model": answer.model, "metric": answer.metric, "missing": answer.gone}
    return next((kind for kind, asked in told.items() if asked is not None), "execution")


def _facts(answer: Lineage, execution: Manifest) -> dict[str, Any]:
    body = execution.body
    told = ("stage", "key", "created_at", "seconds", "seed", "code_digest", "external")
    params = dict(body.get("params", {}))
    if "source" in params:
        params["source"] = hide_password(str(params["source"]))
    return {
        **{name: body.get(name) for name in told},
        "params": params,
        "inputs": dict(body["inputs"]),
        "outputs": {name: execution.output_digest(name) for name in body["outputs"]},
        "metrics": execution.metrics,
        "made_from": [
            identity(m) for m in answer.graph.made_from(execution) if isinstance(m, Manifest)
        ],
    }
