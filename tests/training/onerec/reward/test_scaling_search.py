"""The scaling study's comparison of beams, on a recommender that a run could have published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reward_world import RewardWorld, give_all
from stage_harness import Bench

from benchmarks.onerec_scaling import search
from components.training.onerec.data import read_sequences
from components.training.onerec.recommender import Recommender


def test_hits_of_each_beam_are_those_of_its_lists(
    world: RewardWorld, recommender: Recommender, tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    give_all(bench, world, recommender, signals=True)
    threads = torch.get_num_threads()
    rows = {name: (value, unit) for name, value, unit in search(bench.artifacts, (4, 32))}
    assert torch.get_num_threads() == threads
    assert [*rows] == [
        "beams_4_hr_at_10",
        "beams_4_ms_a_request",
        "beams_32_pass_at_8",
        "beams_32_hr_at_10",
        "beams_32_pass_at_32",
        "beams_32_ms_a_request",
    ]
    valid = read_sequences(world.valid.to_batches())
    event_U = valid.example_targets()
    for width in (4, 32):
        lists = recommender.rank(valid, event_U, beams=width, top_n=max(10, width))
        lists_UN = np.concatenate([items for items, _ in lists])
        for k in (8, 10, 32):
            name = f"beams_{width}_" + ("hr_at_10" if k == 10 else f"pass_at_{k}")
            if name in rows:
                hits = [
                    t in row[:k] for t, row in zip(valid.item_E[event_U], lists_UN, strict=True)
                ]
                assert rows[name] == (pytest.approx(np.mean(hits)), "users")
    assert rows["beams_32_pass_at_32"][0] > rows["beams_32_hr_at_10"][0] > 0
    assert all(value > 0 for name, (value, _) in rows.items() if name.endswith("ms_a_request"))
