"""From the artifacts and manifests of a run to what the report shows.

Reads artifacts through their handles only, large tables in batches. A missing piece is an error
that names the artifact; only what a source truly may lack (a citation, a title, a validation
curve) is left out.

Shapes: N items, Q levels of a semantic id, K codebook size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from components.evaluation.ranking import metrics
from components.evaluation.report import examples, formats
from components.evaluation.report.content import (
    HEADLINE_METRIC,
    Alignment,
    Artifact,
    BrokenRule,
    Candidate,
    Change,
    Curve,
    Difference,
    Estimate,
    Evaluation,
    Health,
    Level,
    Method,
    Page,
    Period,
    Search,
    SemanticIds,
    Source,
    Split,
    StageRecord,
    TableHealth,
    Verdict,
)
from components.pipeline.errors import DataContractError

if TYPE_CHECKING:
    from components.evaluation.report.stage import ReportParams
    from components.pipeline.artifacts import Input, Inputs


def collect(inputs: Inputs, params: ReportParams, summaries: Mapping[str, str]) -> Page:
    """Everything the page shows.

    Args:
        inputs: the inputs of the report stage.
        params: its parameters.
        summaries: what each stage does, one line, by stage name.

    Raises:
        DataContractError: an artifact lacks something the report needs.
    """
    lineage = inputs.lineage()
    stages = stage_records(lineage, summaries)
    evaluation = read_evaluation(inputs["evaluation"])
    catalogue, items = inputs["catalogue"], inputs["items"]
    split = read_split(inputs["source"], inputs["test_examples"], lineage)
    return Page(
        created=max(stage.finished for stage in stages),
        verdict=read_verdict(inputs["registration"]),
        source=read_source(inputs["source"]),
        split=split,
        evaluation=evaluation,
        users=examples.example_users(
            inputs["test_examples"],
            inputs["recommendations"],
            catalogue,
            items,
            count=params.example_users,
            history=params.history,
            shown=params.recommendations,
            seed=params.seed,
            target=_TARGETS[split.protocol],
        ),
        recommender=read_recommender(inputs["recommender"]),
        curves=read_curves(inputs["training_curve"]),
        alignment=read_alignment(inputs["alignment_curve"], params.seed),
        baseline=read_search(inputs["sasrec"]),
        semantic_ids=read_semantic_ids(inputs["semantic_ids"], catalogue, items, params.seed),
        health=read_health(inputs["data_health"], inputs["quarantine"]),
        stages=stages,
        report_parents=tuple(dict.fromkeys(str(a.manifest["stage"]) for a in inputs.values())),
        environment=environment(lineage),
        command="reelflow run recommend --params params.yaml",
        params_yaml=params_yaml(lineage),
    )


def _need(
    record: Mapping[str, Any], key: str, artifact: str, stage: str, file: str = "data.json"
) -> Any:
    if key not in record:
        raise DataContractError(
            f"'{key}' is missing; there is {', '.join(map(str, record)) or 'nothing'}",
            where=f"artifact '{artifact}' {file}",
            remedy=f"make it again: reelflow stage {stage} --force",
        )
    return record[key]


def read_verdict(registration: Input) -> Verdict:
    """What the registry decided, as sentences."""
    record = registration.read_json()
    decision = _need(record, "decision", registration.name, "register")
    reason = str(_need(record, "reason", registration.name, "register"))
    gate = record.get("gate") or {}
    told = {k: v for k, v in gate.items() if v is not None and k not in ("decision", "reason")}
    facts = tuple((_words(name), _fact(value)) for name, value in told.items())
    if decision == "not_registered":
        headline = "The model was not registered"
        return Verdict("not registered", headline, _sentence(reason), None, facts)
    model = f"{record['model']} version {record['version']}"
    previous = record.get("previous_champion")
    rival = f"version {previous}" if previous is not None else ""
    text = _comparison(gate, rival) or _sentence(reason)
    if decision == "champion":
        words = f"beats {rival}" if rival else "is the first champion"
        return Verdict("champion", f"{model} {words}", text, model, facts)
    words = f"does not replace {rival or 'the champion'}"
    return Verdict("challenger", f"{model} {words}", text, model, facts)


def _comparison(gate: Mapping[str, Any], rival: str) -> str:
    """The figures of the gate as a sentence; empty where nothing was compared."""
    if any(gate.get(key) is None for key in ("champion", "difference", "low", "high")):
        return ""
    gap = Difference(gate["metric"], "", rival, _estimate({**gate, "value": gate["difference"]}))
    interval = f"{formats.signed(gate['low'])} to {formats.signed(gate['high'])}"
    ending = {
        "beats": "",
        "is worse than": " It is worse.",
        "does not beat": " The interval includes 0: it does not beat it.",
    }
    return (
        f"{formats.metric_label(gate['metric'])} is {formats.score(gate['ours'])} against "
        f"{formats.score(gate['champion'])} of {rival or 'the champion'}, for the same "
        f"{formats.count(gate['users'])} users: a paired difference of "
        f"{formats.signed(gate['difference'])} (95 % interval {interval})."
        f"{ending[gap.outcome]}"
    )


def read_source(source: Input) -> Source:
    record = source.read_json()
    ground_truth = _flat(record.get("ground_truth") or {})
    return Source(
        format=str(_need(record, "format", source.name, "ingest")),
        uri=formats.without_credentials(str(record.get("uri") or "")),
        citation=str(record.get("citation") or ""),
        licence=str(record.get("licence") or ""),
        notes=tuple(str(note) for note in record.get("notes") or ()),
        facts=tuple((_words(name), _fact(v)) for name, v in ground_truth.items()),
    )


#: Which event of a user is the target, by protocol of the split.
_TARGETS = {
    "temporal": "the first positive event of the test period",
    "leave one out": "the last event of the user",
}


def read_split(source: Input, test_examples: Input, lineage: Sequence[Mapping[str, Any]]) -> Split:
    """The protocol and the periods that the split made, with their users."""
    own = _need(source.read_json(), "split", source.name, "ingest")
    made = next(body for body in lineage if body["stage"] == "split")
    params, counts = made["params"], made["metrics"]
    asked = params.get("protocol", "auto")
    if (own["protocol"] if asked == "auto" else asked) == "leave_one_out":
        protocol = "leave one out"
        events = ("all but the last two events", "the event before the last", "the last event")
    else:
        protocol = "temporal"
        valid_from, test_from = (
            date.fromisoformat(str(day)) if day else None
            for day in (params.get(name) or own.get(name) for name in ("valid_from", "test_from"))
        )
        events = _days(valid_from, test_from, test_examples)
    train, valid, test = events
    total = formats.count(counts["train_events"])
    return Split(
        protocol,
        (
            Period("train", int(counts["train_users"]), f"{train}: {total} events"),
            Period("validation", int(counts["valid_users"]), valid),
            Period("test", int(counts["test_users"]), test),
        ),
    )


def _days(valid: date | None, test: date | None, examples: Input) -> tuple[str, str, str]:
    """The periods of a temporal split in words; a boundary that the data chose is None."""
    column = "target_timestamp_ms"
    times = [batch.column(column).to_numpy() for batch in examples.batches([column])]
    first, last = (
        datetime.fromtimestamp(ms / 1000, UTC).date()
        for ms in (min(t.min() for t in times), max(t.max() for t in times))
    )
    target = "the first positive event"
    train = "events before " + ("the validation period" if valid is None else formats.day(valid))
    validation = f"{target} between train and test"
    if valid and test:
        validation = f"{target}, {_span(valid, test - timedelta(days=1))}"
    # The business days of a log need not be those of its timestamps.
    start = test or first
    return train, validation, f"{target}, {_span(start, max(start, last))} (last target)"


def _span(first: date, last: date) -> str:
    return formats.day(first) + (f" to {formats.day(last)}" if last != first else "")


def read_recommender(recommender: Input) -> str:
    """A sentence about what the model is made of, from its configuration."""
    record = recommender.read_json("config.json")
    model = _need(record, "model", recommender.name, "train_recommender", "config.json")
    width, encoder, decoder, recent, positive, levels, codes = (
        _need(model, key, recommender.name, "align_recommender", "config.json")
        for key in (
            "d_model",
            "encoder_layers",
            "decoder_layers",
            "short_term",
            "positive_feedback",
            "num_levels",
            "codebook_size",
        )
    )
    liked = f"and, as a pathway of its own, the newest {positive} positive events"
    others = []
    if (long := model.get("lifelong") or {}).get("entries"):
        others.append(f"the clusters of the newest {formats.count(long['entries'])} events")
    if known := model.get("static_rows"):
        others.append(f"{len(known)} features of the user")
    beside = f" Beside them it reads {' and '.join(others)}." if others else ""
    memory = model.get("memory") or {}
    copied = (
        f"and may copy from a memory of up to {memory['successors']} items that followed each of "
        f"the newest {memory['events']} events"
        if memory.get("successors")
        else "without a memory of successors"
    )
    return (
        f"An encoder (layers: {encoder}, width: {width}) reads the newest {recent} events "
        f"{liked if positive else 'and has no pathway for positive events'}; a decoder (layers: "
        f"{decoder}) writes the {levels} codes of the next item, {formats.count(codes)} codes a "
        f"level, {copied}.{beside}"
    )


def read_search(sasrec: Input) -> Search:
    """The candidates of the tuned baseline and which one was chosen."""
    record = sasrec.read_json()
    candidates, chosen, cut_short = (
        _need(record, key, sasrec.name, "train_sasrec")
        for key in ("candidates", "chosen", "cut_short")
    )
    told = ("epochs", "best_epoch", "valid_ndcg_at_10", "curve")
    return Search(
        tuple(
            Candidate(
                tuple((_words(k), _fact(v)) for k, v in candidate.items() if k not in told),
                int(candidate["epochs"]),
                int(candidate["best_epoch"]),
                float(candidate["valid_ndcg_at_10"]),
            )
            for candidate in candidates
        ),
        int(chosen),
        bool(cut_short),
    )


def read_evaluation(evaluation: Input) -> Evaluation:
    record = evaluation.read_json()
    methods = _need(record, "methods", evaluation.name, "evaluate_recommender")
    for method in methods.values():
        _need(method["metrics"], HEADLINE_METRIC, evaluation.name, "evaluate_recommender")
    differences = tuple(
        Difference(d["metric"], d["method"], d["baseline"], _estimate(d))
        for d in _need(record, "differences", evaluation.name, "evaluate_recommender")
    )
    return Evaluation(
        ours=differences[0].method if differences else next(iter(methods)),
        methods=tuple(
            Method(
                name,
                int(method["n"]),
                _estimates(method["metrics"]),
                _estimates(method.get("masked_metrics", {})),
                method.get("distinct_items", {}).get("10"),
            )
            for name, method in methods.items()
        ),
        differences=differences,
        catalogue_size=int(record["catalogue_size"]),
        history_masked=bool(record.get("history_masked", False)),
        beams=record.get("beams"),
        control_overlap=record.get("swapped_history_overlap_at_10"),
        alarms=tuple(str(alarm) for alarm in record.get("alarms") or ()),
    )


def _estimates(record: Mapping[str, Any]) -> dict[str, Estimate]:
    return {metric: _estimate(estimate) for metric, estimate in record.items()}


def _estimate(record: Mapping[str, Any]) -> Estimate:
    return Estimate(float(record["value"]), float(record["low"]), float(record["high"]))


def read_curves(curve: Input) -> tuple[Curve, ...]:
    """Training loss and all validation series of the training curve."""
    columns = curve.schema.names
    validation = [name for name in columns if name.startswith("valid")]
    wanted = ["loss", *sorted(validation, key=lambda name: HEADLINE_METRIC not in name)]
    if missing := {"step", "loss"} - set(columns):
        raise DataContractError(
            f"column '{min(missing)}' is missing; there is {', '.join(columns)}",
            where="artifact 'training_curve'",
            remedy="make it again: reelflow stage train_recommender --force",
        )
    table = curve.read_table(["step", *wanted])
    steps = table["step"].to_numpy()
    curves = []
    for name in wanted:
        values = table[name].to_numpy().astype(np.float64)
        known = np.isfinite(values)
        stem = name.removeprefix("validation_").removeprefix("valid_")
        title = "Training loss" if name == "loss" else f"Validation {formats.metric_label(stem)}"
        if known.any():
            marked = None
            if name != "loss":
                best = (np.nanargmin if "loss" in name else np.nanargmax)(values)
                marked = float(steps[best]), "best"
            curves.append(Curve(title, steps[known].tolist(), values[known].tolist(), marked))
    return tuple(curves)


#: Figures of the alignment and what they are called.
ALIGNMENT = {
    "reward": "Preference for the lists (P-Score)",
    "judge": "The same by an independent judge",
    "ndcg_at_10": "NDCG@10",
    "legality": "Legal ids among unconstrained samples",
}


def read_alignment(curve: Input, seed: int) -> Alignment:
    """What was found while the recommender was aligned, and what it gave users set apart.

    Args:
        seed: of the bootstrap.
    """
    record = curve.read_json()
    steps, kept_step = (
        int(_need(record, key, curve.name, "align_recommender")) for key in ("steps", "best_step")
    )
    if not steps:
        return Alignment(0, 0)
    floor, choosing_users = (
        _need(record, key, curve.name, "align_recommender")
        for key in ("ndcg_floor", "choosing_users")
    )
    table = curve.read_table(["step", *(f"choice_{name}" for name in ALIGNMENT)])
    step = table["step"].to_numpy()
    curves = []
    for name, title in ALIGNMENT.items():
        values = table[f"choice_{name}"].to_numpy().astype(np.float64)
        known = np.isfinite(values)
        marked = (float(kept_step), "kept") if kept_step else None
        least = (float(floor), "no weights are kept below") if name == "ndcg_at_10" else None
        curves.append(Curve(title, step[known].tolist(), values[known].tolist(), marked, least))
    users = curve.load_arrays("reported_users.safetensors")
    changes = []
    for name, title in ALIGNMENT.items():
        before_U, after_U = users[f"{name}_before"], users[name]
        found = metrics.paired_difference(after_U, before_U, seed)
        estimate = Estimate(found.mean, found.low, found.high)
        gap = Difference(name, "aligned", "before", estimate)
        changes.append(Change(title, float(before_U.mean()), float(after_U.mean()), gap))
    return Alignment(
        steps,
        kept_step,
        float(floor),
        int(choosing_users),
        len(users["reward"]),
        tuple(curves),
        tuple(changes) if kept_step else (),
    )


def read_semantic_ids(
    semantic_ids: Input, catalogue: Input, items: Input, seed: int
) -> SemanticIds:
    """Statistics counted from the codes themselves, and the errors that training recorded."""
    record = semantic_ids.read_json()
    codebook_size, mse, relative_error, *before = (
        _need(record, key, semantic_ids.name, "semantic_ids")
        for key in (
            "codebook_size",
            "mse_per_level",
            "relative_error",
            "colliding_before",
            "largest_before",
            "moved",
        )
    )
    colliding_before, largest_before, moved = map(int, before)
    codes_NQ = semantic_ids.load_arrays()["codes"]
    _, sizes = np.unique(codes_NQ, axis=0, return_counts=True)
    return SemanticIds(
        levels=tuple(
            _level(np.bincount(codes_N, minlength=codebook_size), *errors)
            for codes_N, *errors in zip(codes_NQ.T, mse, relative_error, strict=True)
        ),
        items=len(codes_NQ),
        distinct=len(sizes),
        colliding_items=int(sizes[sizes > 1].sum()),
        largest_bucket=int(sizes.max()),
        colliding_before=colliding_before,
        largest_before=largest_before,
        moved=moved,
        prefixes=examples.prefix_examples(codes_NQ, catalogue, items, seed=seed),
    )


def _level(counts_K: npt.NDArray[np.int64], mse: float, relative_error: float) -> Level:
    share = counts_K[counts_K > 0] / counts_K.sum()
    return Level(
        counts=tuple(int(c) for c in counts_K),
        entropy_bits=float(-(share * np.log2(share)).sum()),
        max_entropy_bits=math.log2(len(counts_K)),
        mse=mse,
        relative_error=relative_error,
    )


def read_health(data_health: Input, quarantine: Input) -> Health:
    record = data_health.read_json()
    tables = _need(record, "tables", data_health.name, "validate")
    broken = [
        BrokenRule(
            table=table,
            rule=rule["rule"],
            severity=rule["severity"],
            reason=rule["reason"],
            allowed=str(rule["allowed"]),
            broken=int(rule["broken"]),
            of=int(rule["of"]),
            observed=rule["observed"] if rule["level"] == "table" else None,
        )
        for table, report in tables.items()
        for rule in report["rules"]
        if rule["broken"]
    ]
    quarantining = [(r.table, r.rule) for r in broken if r.severity == "critical"]
    version = record.get("great_expectations")
    return Health(
        tables=tuple(
            TableHealth(name, t["rows_in"], t["rows_passed"], t["rows_quarantined"])
            for name, t in tables.items()
        ),
        checked=sum(len(report["rules"]) for report in tables.values()),
        judge=f"Great Expectations {version}" if version else "Arrow masks alone",
        broken=tuple(sorted(broken, key=lambda r: -r.broken)),
        examples=examples.quarantine_examples(quarantine, quarantining),
    )


def stage_records(
    lineage: Sequence[Mapping[str, Any]], summaries: Mapping[str, str]
) -> tuple[StageRecord, ...]:
    """One record for each upstream manifest, in the order of ``lineage``."""
    writer = {name: str(m["stage"]) for m in lineage for name in m["outputs"]}
    records = []
    for body in lineage:
        name = str(body["stage"])
        records.append(
            StageRecord(
                name=name,
                summary=summaries.get(name, ""),
                seconds=float(body["seconds"]),
                peak_rss_bytes=body.get("peak_rss_bytes"),
                finished=datetime.fromisoformat(body["created_at"]),
                parents=tuple(dict.fromkeys(writer[a] for a in body["inputs"])),
                inputs=tuple(Artifact(a, d, writer[a]) for a, d in body["inputs"].items()),
                outputs=tuple(_artifact(a, o, name) for a, o in body["outputs"].items()),
                params=_flat(body["params"]),
                metrics=body["metrics"],
                key=str(body["key"]),
                code_digest=str(body["code_digest"]),
            )
        )
    return tuple(records)


def _artifact(name: str, record: Mapping[str, Any], stage: str) -> Artifact:
    size = sum(int(file["size"]) for file in record["files"])
    return Artifact(name, str(record["digest"]), stage, record.get("rows"), size)


def environment(lineage: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Versions and machine; where stages ran under different ones, all of them."""
    found: dict[str, dict[str, None]] = {}
    for body in lineage:
        for name, value in _flat(body["environment"]).items():
            found.setdefault(name, {})[str(value)] = None
    found["seed"] = {str(body["seed"]): None for body in lineage}
    return tuple((name, " and ".join(values)) for name, values in found.items())


def params_yaml(lineage: Sequence[Mapping[str, Any]]) -> str:
    """The parameters of all upstream stages as a params.yaml."""
    import yaml

    sections = {str(body["stage"]): _public(body["params"]) for body in lineage if body["params"]}
    return str(yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=88))


def _public(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _public(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_public(v) for v in value]
    return formats.without_credentials(value) if isinstance(value, str) else value


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = _public(item)
    return flat


def _fact(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return formats.count(value)
    return formats.compact(value) if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _sentence(text: str) -> str:
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) or not text else text + "."
