"""Claims about what an item of the service's catalogue takes, now and after changes."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

import pyarrow as pa

from benchmarks import onerec_memory
from benchmarks.synthetic_onerec import catalogue as random_codes
from benchmarks.synthetic_version import write_version
from components.serving.catalogue import Catalogue
from components.serving.journal import Journal
from components.serving.schema import NewItem
from components.training.onerec.config import OneRecConfig

#: Codes 12, ids 8, their order 8, popularity 8, and this trie 11: it has few leaves.
AN_ITEM = 53


def held_bytes(items: int, folder: Path) -> list[int]:
    """In arrays of NumPy and Arrow: loaded, after an item came, after one went."""
    config = OneRecConfig(**onerec_memory._values(items, "sid", quick=True))
    write_version(folder / "files", config, random_codes(items, config.codebook_size))
    gc.collect()
    tracemalloc.start()
    arrow = pa.total_allocated_bytes()

    def held() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - arrow

    try:
        files = {place.name: place for place in (folder / "files").iterdir()}
        catalogue = Catalogue(files, Journal(folder / "journal"))
        found = [held()]
        catalogue.add([NewItem(item_id=1, semantic_id=[0] * catalogue.levels)])
        found.append(held())
        assert catalogue.withdraw(1000)
        return [*found, held()]
    finally:
        tracemalloc.stop()


def test_an_item_takes_what_is_looked_up_and_no_more_after_changes(tmp_path: Path) -> None:
    """As the difference of two sizes, which knows nothing of what does not grow."""
    held_bytes(500, tmp_path / "first")
    few = held_bytes(5_000, tmp_path / "few")
    many = held_bytes(45_000, tmp_path / "many")
    an_item = [(more - less) / 40_000 for less, more in zip(few, many, strict=True)]
    # Codes are told by safetensors until the first change, and not counted.
    assert 30 < an_item[0] < AN_ITEM
    assert 40 < an_item[1] < AN_ITEM
    assert 40 < an_item[2] < AN_ITEM


def test_the_benchmark_measures_the_service_of_a_whole_version() -> None:
    found = onerec_memory.measure_service_apart(500, quick=True)
    assert set(found) == set(onerec_memory.OF_SERVICE)
    assert found["load_peak"] >= found["loaded"] > 50
    assert found["change_peak"] >= found["changed"] > 50
