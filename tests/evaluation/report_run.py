"""A small run in a real artifact store, as the report stage meets it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from components.data.contracts import ITEMS
from components.pipeline.artifacts import Input, Inputs, Manifest, Outputs, Store
from components.pipeline.run import StageRun

STAGES = {
    "ingest": (),
    "validate": ("ingest",),
    "split": ("validate", "ingest"),
    "item_features": ("validate", "split"),
    "align_items": ("validate", "split", "item_features"),
    "semantic_ids": ("align_items",),
    "train_recommender": ("split", "semantic_ids"),
    "align_recommender": ("train_recommender",),
    "train_sasrec": ("split",),
    "evaluate_recommender": ("split", "semantic_ids", "align_recommender", "train_sasrec"),
    "register": ("align_recommender", "semantic_ids", "evaluate_recommender"),
}
OUTPUTS = {
    "ingest": ("source",),
    "validate": ("items", "quarantine", "data_health"),
    "split": ("catalogue", "test_examples"),
    "item_features": ("item_embedding",),
    "align_items": ("aligned_embedding",),
    "semantic_ids": ("semantic_ids",),
    "train_recommender": ("training_curve",),
    "align_recommender": ("recommender", "alignment_curve"),
    "train_sasrec": ("sasrec",),
    "evaluate_recommender": ("evaluation", "recommendations"),
    "register": ("registration",),
}
METRICS = {
    "split": {
        "train_users": 45.0,
        "valid_users": 42.0,
        "test_users": 40.0,
        "train_events": 4321.0,
    }
}
#: Figures of choosing users after steps 0, 10, 20 and 30: the highest reward loses NDCG@10.
ALIGNMENT = {
    "reward": (0.40, 0.41, 0.42, 0.45),
    "judge": (0.30, 0.31, 0.33, 0.32),
    "ndcg_at_10": (0.05, 0.06, 0.05, 0.04),
    "legality": (0.20, 0.50, 0.60, 0.70),
}
TOPICS = ("cooking", "football", "street piano", "knitting", "volcanoes", "parkour")


@dataclass
class Content:
    """What the artifacts hold; a test changes what it is about."""

    items: int = 60
    users: int = 40
    titles: list[str | None] = field(default_factory=list)
    json: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pa.Table] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    codes: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    #: What the alignment gave users who chose no weights of it: +0.02 to some, by the reward alone.
    aligned: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        self.model = self.model or {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "short_term": 20,
            "positive_feedback": 32,
            "num_levels": 3,
            "codebook_size": 8,
            "memory": {"successors": 16, "events": 4, "window": 3},
        }
        n, u = self.items, self.users
        ids = np.arange(n) * 3 + 100
        self.titles = self.titles or [f"{TOPICS[i % 6]} clip {i}" for i in range(n)]
        self.codes = np.stack(
            [np.arange(n) % 6, np.arange(n) // 6 % 4, np.arange(n) // 24], axis=1
        ).astype(np.int32)
        base_U = np.random.default_rng(3).random(48)
        self.aligned = self.aligned or {
            f"{name}{when}": base_U + gain * (when == "") * (np.arange(48) % 4 > 0)
            for name, gain in {
                "reward": 0.02,
                "judge": 0.0,
                "ndcg_at_10": 0,
                "legality": -0.1,
            }.items()
            for when in ("_before", "")
        }
        histories = [rng.integers(0, n, rng.integers(3, 15)).tolist() for _ in range(u)]
        targets = rng.integers(0, n, u)
        lists = [rng.permutation(n)[:20].tolist() for _ in range(u)]
        self.tables = {
            "items": pa.table(
                {
                    "item_id": ids,
                    "title": pa.array(self.titles, pa.string()),
                    "caption": pa.nulls(n, pa.string()),
                    "tags": [[TOPICS[i % 6], "short"] for i in range(n)],
                    "author_id": pa.nulls(n, pa.int64()),
                    "duration_s": pa.nulls(n, pa.float32()),
                    "video": pa.nulls(n, pa.string()),
                    "image": pa.nulls(n, pa.string()),
                },
                schema=ITEMS.schema,
            ),
            "catalogue": pa.table(
                {
                    "item_index": np.arange(n, dtype=np.int32),
                    "item_id": ids,
                    "train_count": np.arange(n) + 2,
                    "train_positive_count": np.arange(n) + 1,
                }
            ),
            "test_examples": pa.table(
                {
                    "user_id": np.arange(u) + 1000,
                    "item_index": pa.array(histories, pa.list_(pa.int32())),
                    "positive": [[bool(i % 3 == 0) for i in h] for h in histories],
                    "target": targets.astype(np.int32),
                    "target_timestamp_ms": 1_700_000_000_000 + 86_400_000 * (np.arange(u) // 5),
                }
            ),
            "recommendations": pa.table(
                {
                    "user_id": np.arange(u) + 1000,
                    "item_index": pa.array(lists, pa.list_(pa.int32())),
                    "score": pa.array([[0.5] * 20] * u, pa.list_(pa.float32())),
                }
            ),
            "quarantine": pa.table(
                {
                    "table": ["interactions"] * 3,
                    "row": [4, 9, 11],
                    "rule": ["watch_time_not_negative"] * 3,
                    "reason": ["watch_time_s is negative"] * 3,
                    "record": ['{"user_id": 1, "watch_time_s": -3}'] * 3,
                }
            ),
            "alignment_curve": pa.table(
                {
                    "step": np.arange(31),
                    "reward": [None, *rng.normal(0.4, 0.01, 30)],
                    **{
                        f"choice_{name}": pa.array(
                            [figures[s // 10] if s % 10 == 0 else None for s in range(31)]
                        )
                        for name, figures in ALIGNMENT.items()
                    },
                }
            ),
            "training_curve": pa.table(
                {
                    "step": np.arange(1, 501),
                    "loss": 2 + 4 * np.exp(-np.arange(1, 501) / 90) + rng.normal(0, 0.1, 500),
                    "valid_ndcg_at_10": pa.array(
                        [
                            0.05 * (1 - math.exp(-s / 150)) if s % 50 == 0 else None
                            for s in range(1, 501)
                        ]
                    ),
                }
            ),
        }
        rule = {
            "level": "row",
            "column": "watch_time_s",
            "allowed": "at least 0",
            "of": 5000,
            "observed": None,
            "examples": [],
        }
        self.json = {
            "source": {
                "format": "simulator",
                "uri": "",
                "citation": "",
                "licence": "",
                "split": {"protocol": "leave_one_out", "valid_from": None, "test_from": None},
                "notes": ["timestamps were derived from the order of rows"],
                "ground_truth": {"topics": 6, "best": {"ndcg_at_10": 0.21}},
                "newest_day": "2026-01-01",
            },
            "data_health": {
                "tables": {
                    "interactions": {
                        "rows_in": 5000,
                        "rows_passed": 4997,
                        "rows_quarantined": 3,
                        "rules": [
                            rule
                            | {
                                "rule": "watch_time_not_negative",
                                "severity": "critical",
                                "reason": "watch_time_s is negative",
                                "broken": 3,
                            },
                            rule
                            | {
                                "rule": "watched_is_not_longer",
                                "severity": "warning",
                                "reason": "watched longer than the video",
                                "broken": 17,
                            },
                            rule
                            | {
                                "rule": "user_known",
                                "severity": "critical",
                                "reason": "x",
                                "broken": 0,
                            },
                        ],
                    },
                    "items": {"rows_in": 60, "rows_passed": 60, "rows_quarantined": 0, "rules": []},
                },
                "max_quarantine_share": 0.05,
                "great_expectations": "1.24.1",
                "day": "2026-01-01",
            },
            "semantic_ids": {
                "version": "0123456789abcdef",
                "num_levels": 3,
                "codebook_size": 8,
                "mse_per_level": [0.6, 0.4, 0.3],
                "relative_error": [0.66, 0.44, 0.33],
                "colliding_before": 12,
                "largest_before": 4,
                "moved": 8,
            },
            "alignment_curve": {
                "best_step": 20,
                "steps": 30,
                "ndcg_floor": 0.05,
                "choosing_users": 500,
            },
            "sasrec": {
                "chosen": 1,
                "cut_short": False,
                "candidates": [
                    {
                        "learning_rate": rate,
                        "dropout": 0.2,
                        "tied": True,
                        "epochs": 9,
                        "best_epoch": 7,
                        "valid_ndcg_at_10": score,
                        "curve": [[1, 5.0, score]],
                    }
                    for rate, score in ((0.001, 0.031), (0.005, 0.042))
                ],
            },
            "evaluation": evaluation_json(n, u),
            "registration": {
                "model": "recommender-simulator",
                "version": "3",
                "alias": "champion",
                "decision": "champion",
                "reason": "beats version 2 on ndcg_at_10",
                "gate": {
                    "decision": "champion",
                    "reason": "beats version 2 on ndcg_at_10",
                    "metric": "ndcg_at_10",
                    "users": u,
                    "ours": 0.043,
                    "champion": 0.0399,
                    "difference": 0.0031,
                    "low": 0.0012,
                    "high": 0.005,
                },
                "previous_champion": "2",
                "tracking": "sqlite:///mlflow.db",
            },
        }


def evaluation_json(items: int, users: int) -> dict[str, Any]:
    metrics = [f"{m}_at_{k}" for m in ("hr", "ndcg") for k in (5, 10, 20)]
    values = {"onerec": 0.043, "sasrec": 0.041, "bigram": 0.03, "popularity": 0.016}

    def estimate(v: float, half: float) -> dict[str, float]:
        return {"value": v, "low": v - half, "high": v + half}

    return {
        "methods": {
            name: {
                "n": users,
                "metrics": {m: estimate(v, 0.003) for m in metrics},
                "masked_metrics": {m: estimate(v + 0.01, 0.003) for m in metrics},
                "distinct_items": {"5": 20, "10": 31, "20": 50},
            }
            for name, v in values.items()
        },
        "differences": [
            {"metric": m, "method": "onerec", "baseline": b} | estimate(v, half)
            for m in metrics
            for b, v, half in (
                ("sasrec", 0.002, 0.004),
                ("bigram", 0.013, 0.003),
                ("popularity", -0.027, 0.003),
            )
        ],
        "collision_rate": 0.1,
        "catalogue_size": items,
        "beams": 64,
        "history_masked": False,
        "swapped_history_overlap_at_10": 0.21,
        "alarms": [],
    }


def build(folder: Path, content: Content | None = None, **changes: Any) -> Inputs:
    """Publish every upstream stage of the report and open the report's inputs.

    ``changes`` update manifest bodies: ``train_recommender={"params": {...}}``.
    """
    content = content or Content()
    store = Store(str(folder / "store"), folder / "fetched")
    done: dict[str, Manifest] = {}
    artifacts: dict[str, Input] = {}
    for index, (stage, above) in enumerate(STAGES.items()):
        outputs = Outputs(store, stage, OUTPUTS[stage], folder / "staging" / stage)
        for name in OUTPUTS[stage]:
            _write(outputs, name, content)
        body = {
            "stage": stage,
            "key": f"{index:032x}",
            "code": {},
            "code_digest": f"{index:064x}",
            "params": {"seed": 0, "width": 64, "optimiser": {"learning_rate": 0.001}},
            "params_digest": "",
            "inputs": {a: done[s].output_digest(a) for s in above for a in OUTPUTS[s]},
            "external": None,
            "outputs": outputs.seal(),
            "metrics": {"rows": 5000.0, "ndcg_at_10": 0.043} | METRICS.get(stage, {}),
            "created_at": f"2026-01-01T10:{index:02d}:00.000+00:00",
            "seconds": 3.0 + 40 * (stage == "train_recommender"),
            "peak_rss_bytes": 400 * 2**20,
            "seed": 0,
            "environment": {"python": "3.11.2", "cpus": "2", "torch": "2.13.0"},
        } | changes.get(stage, {})
        done[stage] = store.publish(Manifest(body), replace=True)
        artifacts |= {name: Input(store, name, done[stage]) for name in OUTPUTS[stage]}
    from components.evaluation.report.stage import report  # noqa: F401
    from components.pipeline.stage import REGISTRY

    return Inputs({n: artifacts[n] for n in REGISTRY["report"].inputs}, list(done.values()))


def _write(outputs: Outputs, name: str, content: Content) -> None:
    if name in content.tables:
        outputs[name].write_table(content.tables[name])
    if name in content.json:
        outputs[name].write_json(content.json[name])
    if name == "semantic_ids":
        outputs[name].save_state_dict({"codes": content.codes})
    if name == "alignment_curve":
        outputs[name].save_state_dict(content.aligned, name="reported_users.safetensors")
    if name == "recommender":
        outputs[name].write_json({"model": content.model}, "config.json")
    if name in ("item_embedding", "aligned_embedding"):
        outputs[name].write_json({})


def run_report(
    folder: Path,
    content: Content | None = None,
    params: dict[str, Any] | None = None,
    **changes: Any,
) -> str:
    """The HTML that the report stage writes for this run."""
    from components.evaluation.report.stage import ReportParams, report

    inputs = build(folder, content, **changes)
    store = Store(str(folder / "store"), folder / "fetched")
    outputs = Outputs(store, "report", ("report",), folder / "staging" / "report")
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    metrics = report(
        ReportParams(**(params or {})), inputs, outputs, StageRun("report", 0, scratch)
    )
    html = Path(outputs["report"].path("report.html")).read_bytes()
    assert metrics == {"report_bytes": float(len(html))}
    return html.decode()


def changed(edit: Callable[[Content], object]) -> Content:
    """Content after one edit."""
    content = Content()
    edit(content)
    json.dumps(content.json)
    return content
