"""The decoding benchmark compares like with like, at a size of seconds."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

import torch

from benchmarks import constrained_beam


def test_quick_run_agrees_with_transformers_and_reports_both() -> None:
    threads = torch.get_num_threads()
    results = constrained_beam.run(quick=True)
    assert [r.name for r in results] == ["ids_per_second_4_beams", "ids_per_second_16_beams"]
    for result in results:
        assert result.reference is not None
        assert 0 < result.low <= result.ours <= result.high
    assert torch.get_num_threads() == threads


def test_a_difference_between_the_two_stops_the_benchmark() -> None:
    model, trie, batch, legal = constrained_beam._world(2, quick=True)
    reference = constrained_beam.as_transformers(model, legal)
    constrained_beam.check_same(model, trie, reference, batch, legal, 4)
    ours = batch.pathways["short_term"].sid_BLQ.clone()
    reference.allowed = lambda batch_id, sent: list(range(3 * 16))  # nothing is illegal any more
    with pytest.raises(AssertionError, match="4 beams"):
        constrained_beam.check_same(model, trie, reference, batch, legal, 4)
    assert torch.equal(ours, batch.pathways["short_term"].sid_BLQ)
