"""`python -m experiments sparse`, small."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.cli import main
from experiments.harness.errors import UserError
from experiments.sparse.command import headline
from experiments.sparse.config import SparseConfig, check
from experiments.sparse.products import of_selector, of_window
from experiments.sparse.views import tables
from pallas_kernels.selection import ChunkSelector
from tests.experiments.results import read_result, summary_in, text_of

SMALL = ["--contexts", "1024", "1152", "--windows", "100", "200", "--rows", "3", "--heads", "2/1"]
SMALL += ["--select", "scores:0.4"]


@pytest.mark.slow
@pytest.mark.thorough
def test_reads_fall_with_the_window_and_stay_with_the_context(tmp_path):
    small = [*SMALL, "--head-dim", "16", "--repeats", "1", "--output", str(tmp_path / "out")]
    assert main(["sparse", *small]) == 0
    summary = summary_in(tmp_path / "out")
    shorter, longer = summary["contexts"]
    assert [side.get("window") for side in shorter["sides"]] == [None, 200, 100, None]
    chosen = longer["sides"].pop()
    assert chosen["select"] == "scores:0.4"
    assert chosen["decode"]["chunk_reads"] > 0
    shorter["sides"].pop()
    for phase in ("decode", "prefill"):
        reads = [
            [side[phase]["chunk_reads"] for side in context["sides"]]
            for context in (shorter, longer)
        ]
        assert reads[0][0] < reads[1][0]
        assert reads[0][1:] == reads[1][1:]
        assert reads[1][2] <= reads[1][1]
        assert all(
            side[phase]["least"] > 0 for context in (shorter, longer) for side in context["sides"]
        )
    assert headline(summary).keys() == {"decode time", "prefill time"}
    text = text_of(tables(read_result(tmp_path / "out")))
    assert "1,152" in text
    assert "100%" in text
    assert "scores, 40%" in text
    assert "products, of all" in text


def test_products_are_those_of_what_is_read_and_of_what_is_looked_at():
    """Of two queries in chunks 10 and 11, which read 4 and 5 chunks and choose for 4 queries."""
    positions, whole = np.array([10 * 16 + 3, 11 * 16]), ChunkSelector(1.0)
    assert of_selector(whole, positions, 16) == of_window(None, positions) == 164 + 177
    assert of_window(32, positions) == 64
    read = np.array([2 * (3 * 16 + 4), 2 * (4 * 16 + 1)])
    for policy, looked in (
        ("recent", [0, 0]),
        ("scores", [160, 176]),
        ("bounds", [20, 22]),
        ("hip", [2 * 1 * 3 * 16, 2 * 2 * 3 * 16]),  # of 8 and 9 chunks 1 and 2
    ):
        found = of_selector(ChunkSelector(0.36, policy, whole=0), positions, 16)
        assert found == np.mean(read + np.array(looked) / 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": "9"}, "--heads 9 is not query heads/KV heads"),
        ({"heads": "9/2"}, "--heads 9/2 is not"),
        ({"contexts": (1000,)}, "--contexts must be whole chunks of 64 tokens"),
        ({"contexts": (64,)}, "at least 512, got 64"),
        ({"windows": (0,)}, "--windows"),
        ({"select": ("scores:0",)}, "--keep must be above 0"),
        ({"agreement": 1.5}, "--agreement must be from 0 to 1"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_that_no_run_could_use_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        check(SparseConfig(**options))
