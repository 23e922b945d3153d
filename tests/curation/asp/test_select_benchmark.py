"""The benchmark of selection measures what it says, at a size of seconds."""

from __future__ import annotations

from benchmarks import asp_select


def test_quick_run_measures_a_rule_in_the_middle_of_a_training() -> None:
    found = {result.name: result for result in asp_select.run(quick=True)}
    assert 0 < found["select"].low <= found["select"].ours <= found["select"].high < 60
    assert 0 < found["observe"].ours < found["select"].ours
    # Score, variance, visits, last epoch, how often forgotten, right or wrong.
    assert found["state_of_a_sample"].ours == 4 + 4 + 4 + 4 + 2 + 1
    assert 0.05 < found["peak_memory"].ours < 2
