"""Percentiles of times, by hand."""

from __future__ import annotations

from experiments.harness.percentiles import NAMES, percentiles


def test_percentiles_by_hand():
    assert percentiles([4.0, 1.0, 3.0, 2.0]) == {"mean": 2.5, "p50": 2.5, "p90": 3.7, "p99": 3.97}
    assert percentiles([7.0]) == {"mean": 7.0, "p50": 7.0, "p90": 7.0, "p99": 7.0}
    assert percentiles(iter([1.0, 2.0, 2.0]), digits=2) == {
        "mean": 1.67, "p50": 2.0, "p90": 2.0, "p99": 2.0,
    }  # fmt: skip
    assert percentiles([]) is None
    assert NAMES == ("p50", "p90", "p99")
