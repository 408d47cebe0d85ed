"""`python -m experiments layers`, small."""

from __future__ import annotations

import dataclasses

import pytest

import models
from experiments.cli import main
from experiments.harness.errors import UserError
from experiments.layers.command import headline, run
from experiments.layers.config import LayersConfig, check
from experiments.layers.run import FILE
from experiments.layers.views import tables
from models.dense_layers import load_dense_layers
from tests.experiments.results import read_result, text_of

SMALL = LayersConfig(**LayersConfig.SMOKE)


@pytest.mark.slow
def test_the_layers_that_mind_most_are_written_and_change_most(tmp_path):
    summary = run(dataclasses.replace(SMALL, output=tmp_path / "out"))
    alone = summary["alone"]
    assert len(alone) > 1
    assert min(alone) > 0
    assert summary["dense_layers"] == [alone.index(max(alone))]
    assert 0 < summary["some_read"] < summary["all_choose"]
    path = tmp_path / "out" / FILE
    assert load_dense_layers(path, models.load("random:tiny").model) == (alone.index(max(alone)),)
    assert headline(summary)["dense layers"] == str(alone.index(max(alone)))
    text = text_of(tables(read_result(tmp_path / "out")))
    assert "all layers choose" in text
    assert "100%" in text
    refused = ["generate", "--model", "random:small", "--select", "scores", "--dense-layers"]
    assert main([*refused, str(path), "--output", str(tmp_path / "other")]) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"select": "scores"}, "--select takes POLICY:SHARE"),
        ({"select": "scores:0.2", "chunk_size": 6}, "do not divide a chunk of 6"),
        ({"dense": 0}, "--dense must be at least 1"),
        ({"prefix": 100}, "--prefix must be whole chunks of 16 tokens"),
        ({"prefill_tokens": 32, "chunk_size": 64}, "--prefill-tokens 32 do not fill a chunk"),
    ],
)
def test_values_that_no_run_could_use_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        check(dataclasses.replace(SMALL, **options))


def test_dense_layers_are_beside_a_choice(tmp_path, capsys):
    assert main(["generate", "--dense-layers", str(tmp_path / "none.json")]) == 2
    assert "are layers beside --select, which is not given" in capsys.readouterr().err
    refused = ["quality", "--select", "scores:0.3", "--dense-layers", str(tmp_path / "none.json")]
    assert main(refused) == 2
    assert "no dense layers can be read from" in capsys.readouterr().err
