"""`python -m experiments gradients`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.gradients.command import headline, run
from experiments.gradients.config import GradientsConfig
from experiments.gradients.views import figures, tables
from experiments.harness.errors import UserError
from experiments.harness.reading import read_result


@pytest.mark.slow
def test_both_sides_have_the_same_gradients_and_the_tree_computes_a_prompt_once(tmp_path: Path):
    sizes = {"prompts": (50,), "groups": (3,), "tokens": 9, "repeats": 2}
    summary = run(GradientsConfig(model="random:tiny", output=tmp_path / "out", **sizes))
    [point] = summary["points"]
    assert (point["computed"], point["of"]) == (50 + 3 * 9, 3 * (50 + 9))
    assert 0 < point["gradient_difference"] == summary["largest_difference"] < 1e-5
    assert all(seconds > 0 for seconds in point["seconds"].values())
    assert all(size > 0 for size in point["temporary_bytes"].values())
    assert headline(summary)["least_speedup"] == summary["most_speedup"] == point["speedup"]
    result = read_result(tmp_path / "out")
    [table] = tables(result)
    assert "77" in str(table)
    assert "177" in str(table)
    assert list(figures(result)) == ["picture"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"prompts": (1020,)}, "more than the model's 1,024 positions"),
        ({"groups": (0,)}, "--groups must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_refused(how: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        run(GradientsConfig(**({"model": "random:tiny", "output": tmp_path / "out"} | how)))
