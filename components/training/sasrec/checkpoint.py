"""Candidates of the search on disk: one safetensors file each, replaced after every epoch.

A file holds weights, the best weights, AdamW's moments and, as metadata, what the search knows of
the candidate. It is written under another name and renamed, so a kill leaves the old or the new.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from components.training.sasrec.train import Candidate

FACTS = ("step", "epoch", "best_epoch", "best_score", "cut", "curve")


def save(candidate: Candidate, seconds: float, folder: Path) -> Path:
    """Write the candidate as it stands; the file.

    Args:
        seconds: time that the whole search took so far.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for part, state in (
        ("weights", candidate.model.state_dict()),
        ("best", candidate.best_state),
    ):
        tensors |= {f"{part}/{name}": value.detach().clone() for name, value in state.items()}
    for name, parameter in candidate.model.named_parameters():
        for moment, value in candidate.optimiser.state.get(parameter, {}).items():
            tensors[f"moments/{name}/{moment}"] = value.clone()
    facts = {name: getattr(candidate, name) for name in FACTS} | {"seconds": seconds}
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"{candidate.number}.unfinished"
    save_file(tensors, unfinished, metadata={"facts": json.dumps(facts)})
    return unfinished.replace(_file(candidate, folder))


def restore(candidate: Candidate, folder: Path) -> float:
    """Bring a fresh candidate to where it was saved, if it was; the search's seconds by then."""
    from safetensors import safe_open

    file = _file(candidate, folder)
    if not file.exists():
        return 0.0
    parameters = dict(candidate.model.named_parameters())
    weights: dict[str, Tensor] = {}
    with safe_open(file, "pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        for key in stored.keys():  # noqa: SIM118  (it is no mapping)
            part, _, name = key.partition("/")
            value = stored.get_tensor(key)
            if part == "moments":
                name, _, moment = name.rpartition("/")
                candidate.optimiser.state[parameters[name]][moment] = value
            else:
                (weights if part == "weights" else candidate.best_state)[name] = value
    candidate.model.load_state_dict(weights)
    for name in FACTS:
        setattr(candidate, name, facts[name])
    candidate.curve = [(int(epoch), loss, score) for epoch, loss, score in facts["curve"]]
    return float(facts["seconds"])


def _file(candidate: Candidate, folder: Path) -> Path:
    return folder / f"{candidate.number}.safetensors"
