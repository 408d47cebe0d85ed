"""`python -m experiments clusters`, small."""

from __future__ import annotations

import dataclasses
import json

import pytest

from experiments.cli import main
from experiments.clusters.command import headline, run
from experiments.clusters.config import ClustersConfig, check
from experiments.clusters.views import tables
from experiments.harness.errors import UserError
from tests.experiments.results import read_result, text_of

SMALL = ClustersConfig(**ClustersConfig.SMOKE)


@pytest.mark.slow
@pytest.mark.thorough
def test_fewer_clusters_change_more_and_their_file_is_taken(tmp_path, capsys):
    out = tmp_path / "out"
    summary = run(dataclasses.replace(SMALL, output=out))
    whole, *cells = summary["measured"]
    assert whole["divergence"] == 0
    assert [one["counted"] for one in cells] == ["elbow", "50%"]
    assert all(one["divergence"] > 1e-3 for one in cells)
    assert sum(summary["counts"]["50%"]) == 4
    assert json.loads((out / "50.json").read_text())["clusters"] == summary["counts"]["50%"]
    assert headline(summary)["clusters"] == sum(summary["counts"]["elbow"])
    text = text_of(tables(read_result(out)))
    assert "medoid" in text
    assert "arXiv 2403.08058" in text
    taken = ["generate", "--smoke", "--model", "random:tiny", "--clusters", str(out / "50.json")]
    assert main([*taken, "--output", str(tmp_path / "generated")]) == 0
    capsys.readouterr()
    refused = ["generate", "--model", "random:small", "--clusters", str(out / "50.json")]
    assert main([*refused, "--output", str(tmp_path / "other")]) == 2
    assert "the clusters are of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"shares": (1.0,)}, "--shares must be above 0 and below 1"),
        ({"memberships": ()}, "--memberships must name one or more, each once, got none"),
        ({"prefix": 100}, "--prefix must be a multiple of --chunk-size 16"),
        ({"pieces": 0}, "--pieces must be at least 1"),
    ],
)
def test_values_that_no_run_could_use_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(SMALL, **options))


def test_a_file_that_is_none_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    for command in ("generate", "serve", "soak"):
        assert main([command, "--clusters", str(tmp_path / "none.json")]) == 2
        assert "no clusters of heads can be read from" in capsys.readouterr().err
