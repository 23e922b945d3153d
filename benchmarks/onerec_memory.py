"""OneRec's memory by size of the catalogue: a training step, a beam search, and the service.

Each figure is a process of its own with the same model, sequences and requests; only the catalogue
grows. Items enter by their semantic ids, so nothing that is trained grows with them: what does are
the array tree (int32) and the table of codes, some tens of bytes an item, whose size is a figure.
The reference of each figure is that of the smallest catalogue; a ratio of 1 is flat. The model is
the report's, without what is ours. Of that, embeddings of items beside their ids (``vid``) and the
successor memory are measured beside it at the largest catalogue; items' authors, tags and content
(`model.features`), arrays that are read and not trained, are not. Searches are the model's alone.

Of the service the live catalogue is measured, with the same model in the files of a version: the
most while it is loaded and while one item is taken in, and what it holds after either. An item was
taken in before, so that the change is like any other. What an item adds to each is the difference
between the largest and the smallest catalogue.

Memory is the most that the process held while it worked (resident pages, or the device's allocator
on a GPU), not while the catalogue of a step or search was built. Steps and searches need torch,
NumPy and PyArrow alone: on a bare machine, without pydantic, ``python -m benchmarks.onerec_memory``
leaves the service out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.result import Result, print_lines

if TYPE_CHECKING:
    import numpy as np

    from components.training.onerec.data import Sequences

SUMMARY = "memory of a OneRec training step and beam search as the catalogue grows"

ROOT = Path(__file__).resolve().parent.parent
CATALOGUES = (10_000, 100_000, 1_000_000)
QUICK_CATALOGUES = (500, 5_000)
MEBIBYTE = 1 << 20
#: What the process held at most, what of that came with the work, and what items take in arrays.
UNITS = {
    "training_peak": "MiB",
    "training_adds": "MiB",
    "serving_peak": "MiB",
    "serving_adds": "MiB",
    "bytes_an_item": "B",
}
#: Of the service's catalogue, in MiB.
OF_SERVICE = ("load_peak", "loaded", "change_peak", "changed")
#: Arrays from this size on go back to the system when they are freed, as all those above 32 MiB do:
#: glibc would else raise the bound, and so keep the place of arrays that fit a smaller catalogue.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
#: What can be switched on that grows with the catalogue.
ARMS: dict[str, dict[str, Any]] = {
    "sid": {},
    "vid": {"item_input": "both"},
    "memory": {"memory": {"successors": 16, "events": 4, "window": 3}},
}


def run(quick: bool = False) -> list[Result]:
    """MiB of training, search and service at each size, bytes an item, and what grows."""
    sizes = QUICK_CATALOGUES if quick else CATALOGUES
    plain = [measure_apart(items, "sid", quick) for items in sizes]
    results = []
    for figure, unit in UNITS.items():
        results += [
            _result(f"{figure}_{items}_items", got[figure], plain[0][figure], unit)
            for items, got in zip(sizes, plain, strict=True)
        ]
    for arm in ("vid", "memory"):
        grown = measure_apart(sizes[-1], arm, quick)
        # How many times less the model without this part needs.
        figure = "training_peak"
        name = f"{figure}_{sizes[-1]}_items_without_{arm}"
        results.append(_result(name, plain[-1][figure], grown[figure], "MiB"))
    return results + (service_results(quick) if find_spec("pydantic") else [])


def service_results(quick: bool) -> list[Result]:
    """MiB of the service's catalogue at each size, and bytes that an item adds."""
    sizes = QUICK_CATALOGUES if quick else CATALOGUES
    got = [measure_service_apart(items, quick) for items in sizes]
    results = []
    for figure in OF_SERVICE:
        found = [figures[figure] for figures in got]
        results += [
            _result(f"service_{figure}_{items}_items", mib, found[0], "MiB")
            for items, mib in zip(sizes, found, strict=True)
        ]
        an_item = (found[-1] - found[0]) * MEBIBYTE / (sizes[-1] - sizes[0])
        results.append(_result(f"service_{figure}_an_item", an_item, None, "B"))
    return results


def measure_apart(items: int, arm: str, quick: bool) -> dict[str, float]:
    """Figures of one catalogue from a process of its own.

    Raises:
        RuntimeError: it failed.
    """
    return _apart([str(items), arm, *(["--quick"] if quick else [])], f"{items} items, {arm}")


def measure_service_apart(items: int, quick: bool) -> dict[str, float]:
    """Figures `OF_SERVICE` from a process that does no more than the service does.

    Raises:
        RuntimeError: it failed.
    """
    from benchmarks.synthetic_onerec import catalogue
    from benchmarks.synthetic_version import write_version
    from components.training.onerec.config import OneRecConfig

    config = OneRecConfig(**_values(items, "sid", quick))
    with tempfile.TemporaryDirectory(prefix="reelflow-bench-") as folder:
        write_version(Path(folder) / "artifacts", config, catalogue(items, config.codebook_size))
        return _apart(["service", folder], f"{items} items, service", GIVES_BACK)


def _apart(
    words: list[str], what: str, setting: Mapping[str, str] | None = None
) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.onerec_memory", *words]
    environment = {**os.environ, **(setting or {})}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr.strip().splitlines()[-1:]}")
    return cast(dict[str, float], json.loads(done.stdout))


def measure_service_here(folder: Path) -> dict[str, float]:
    """Figures `OF_SERVICE` of the version in ``folder``, measured in this process."""
    from components.serving.catalogue import Catalogue
    from components.serving.journal import Journal
    from components.serving.schema import NewItem

    watch = _Peak("cpu")
    files = {place.name: place for place in (folder / "artifacts").iterdir()}
    catalogue = Catalogue(files, Journal(folder / "journal"))
    load_peak, loaded = watch.read("load")["load_peak"], _status("VmRSS") / MEBIBYTE
    for item_id in (1, 2):
        watch = _Peak("cpu")
        catalogue.add([NewItem(item_id=item_id, semantic_id=[0] * catalogue.levels)])
    return {
        "load_peak": load_peak,
        "loaded": loaded,
        "change_peak": watch.read("change")["change_peak"],
        "changed": _status("VmRSS") / MEBIBYTE,
    }


def measure_here(items: int, arm: str, quick: bool) -> dict[str, float]:
    """Figures of `UNITS`, measured in this process."""
    import torch

    from benchmarks.onerec_mfu import RULES, new_model
    from benchmarks.synthetic_onerec import catalogue, device_trie
    from components.training.onerec.data import assemble
    from components.training.onerec.decode import recommend
    from components.training.onerec.named_configs import plain_config
    from components.training.onerec.train import make_optimiser, train_step

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = plain_config(_values(items, arm, quick))
    codes_NQ = catalogue(items, config.codebook_size)
    trie = device_trie(codes_NQ, device)
    sequences = random_sequences(items, users=500)
    model = new_model(config, "cpu")
    if model.memory is not None:
        _fill_memory(model.memory, items, config.memory.successors, codes_NQ)
    model.to(device)
    optimiser = make_optimiser(model, RULES)
    targets = sequences.train_targets("all")
    watch = _Peak(device)
    for step in range(3):
        chosen = targets[step * 64 : (step + 1) * 64]
        batch = assemble(sequences, chosen, codes_NQ, config).to(device)
        train_step(model, model, optimiser, batch, 1e-4, RULES, step, 0)
    got = watch.read("training")
    optimiser.zero_grad()
    del optimiser
    watch = _Peak(device)
    events = sequences.example_targets()[:64]
    for lists, _ in recommend(
        model, trie, sequences, events, codes_NQ, width=32, top_n=10, batch_size=16
    ):
        assert (lists >= 0).all()
    arrays = [*trie.child_ptr, *trie.code, trie.item_ptr, trie.items]
    held = sum(array.numel() * array.element_size() for array in arrays) + codes_NQ.nbytes
    return {**got, **watch.read("serving"), "bytes_an_item": held / items}


def _values(items: int, arm: str, quick: bool) -> dict[str, Any]:
    from components.training.onerec.named_configs import named_values

    size: dict[str, Any] = {"d_model": 64, "heads": 4, "ffn": 128, "feature_width": 16}
    size |= {"encoder_layers": 2, "decoder_layers": 2, "positive_feedback": 32}
    size |= {"author_rows": 0, "tag_rows": 0, "static_rows": [], "lifelong": {"entries": 0}}
    size |= {"codebook_size": 64 if quick else 8192, "num_items": items, **ARMS[arm]}
    return named_values("0p121b", **size)


def random_sequences(items: int, users: int, length: int = 60) -> Sequences:
    """Users whose events are of items drawn evenly, every other one positive."""
    import numpy as np

    from components.training.onerec.data import POSITIVE_BIT, Sequences

    rng = np.random.default_rng(0)
    E = users * length
    positive_E = np.arange(E) % 2
    return Sequences(
        item_E=rng.integers(0, items, E).astype(np.int32),
        time_ms_E=np.arange(E, dtype=np.int64) * 1000,
        feedback_E=(positive_E << POSITIVE_BIT).astype(np.int16),
        watch_E=rng.integers(0, 19, E).astype(np.uint8),
        duration_E=rng.integers(0, 24, E).astype(np.uint8),
        play_s_E=np.full(E, np.nan, np.float32),
        start_U1=np.arange(users + 1, dtype=np.int64) * length,
        positive_event=np.flatnonzero(positive_E).astype(np.int32),
        user_id_U=np.arange(users, dtype=np.int64),
        positives_before_E1=np.concatenate([[0], np.cumsum(positive_E)]).astype(np.int32),
    )


def _fill_memory(memory: Any, items: int, successors: int, codes_NQ: np.ndarray) -> None:
    import numpy as np

    from components.training.onerec.memory import FOLDS, Successors

    rng = np.random.default_rng(0)
    item_NR = rng.integers(0, items, (items, successors)).astype(np.int32)
    weight_NR = np.ones(item_NR.shape, np.float32)
    table = Successors(item_NR, weight_NR, weight_NR.sum(1))
    memory.fill(table, codes_NQ)
    memory.practise_on([table] * FOLDS)


class _Peak:
    """The most memory that is held from now on."""

    def __init__(self, device: str) -> None:
        import torch

        self.on_gpu = device == "cuda"
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            # Sets the high-water mark of resident pages to what is resident now (proc(5)).
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self._most()

    def read(self, part: str) -> dict[str, float]:
        """MiB at most, and how much more that is than at first."""
        most = self._most()
        adds = (most - self.before) / MEBIBYTE
        return {f"{part}_peak": most / MEBIBYTE, f"{part}_adds": adds}

    def _most(self) -> int:
        import torch

        if self.on_gpu:
            return int(torch.cuda.max_memory_allocated())
        return _status("VmHWM")


def _status(line: str) -> int:
    """Bytes of this process by /proc/self/status: ``VmRSS``, resident now; ``VmHWM``, at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{line}:")[2].split()[0]) * 1024


def _result(name: str, ours: float, reference: float | None, unit: str) -> Result:
    return Result(name, ours, reference, unit, ours, ours, 1, False)


def main(arguments: list[str]) -> None:
    """All figures, or those of one catalogue: ``[ITEMS ARM | service FOLDER] [--quick]``."""
    quick = "--quick" in arguments
    match [word for word in arguments if word != "--quick"]:
        case ["service", folder]:
            print(json.dumps(measure_service_here(Path(folder))))
        case [items, arm]:
            print(json.dumps(measure_here(int(items), arm, quick)))
        case _:
            print_lines(run(quick))


if __name__ == "__main__":
    main(sys.argv[1:])
