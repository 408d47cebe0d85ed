"""`python -m experiments score`, small."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.harness.errors import UserError
from experiments.harness.reading import read_result
from experiments.score.command import headline, run
from experiments.score.config import WAYS, ScoreConfig
from experiments.score.views import tables
from tests.experiments.results import lines_in


@pytest.mark.slow
def test_what_is_computed_is_what_each_way_says(tmp_path: Path) -> None:
    sizes = {"prefix": 80, "continuations": 3, "tokens": 12, "chunk_size": 16, "repeats": 2}
    config = ScoreConfig(model="random:tiny", output=tmp_path / "out", **sizes)
    summary = run(config)
    own = 3 * 12  # all but the last token of each, and the prefix's last
    computed = {name: way["computed"] for name, way in summary["ways"].items()}
    assert computed == {
        "cold": 79 + own,
        "cached": own,
        "one of them unshared": 80 + 11,
        "alone": own,
    }
    assert summary["largest_difference"] < 1e-4
    assert all(way["seconds"] > 0 for way in summary["ways"].values())
    _, first, second = lines_in(tmp_path / "out")
    assert first["totals"] == pytest.approx(second["totals"], abs=1e-3)
    ways = [one["ways"] for one in (first, second)]
    ratios = [one["cached"]["seconds"] / one["alone"]["seconds"] for one in ways]
    assert headline(summary)["cached / alone"] == pytest.approx(sum(ratios) / 2, abs=1e-3)
    [table] = tables(read_result(tmp_path / "out"))
    assert all(words in str(table) for words in WAYS.values())


def test_a_prefix_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    config = ScoreConfig(model="random:tiny", prefix=1020, output=tmp_path / "out")
    with pytest.raises(UserError, match="more than the model's 1,024 positions"):
        run(config)
