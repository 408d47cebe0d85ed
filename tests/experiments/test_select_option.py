"""`--select` and `--keep`, and `quality --select`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import models
from experiments.cli import main
from experiments.harness.reading import read_result
from experiments.quality.codecs import compare
from experiments.quality.command import run
from experiments.quality.config import QualityConfig
from experiments.quality.scoring import Passage, SharedScorer
from experiments.select_option import POLICIES, YARDSTICKS
from pallas_kernels import selection
from pallas_kernels.selection import ChunkSelector

SMALL = QualityConfig(**QualityConfig.SMOKE)


def test_names_are_those_of_the_library():
    assert (POLICIES, YARDSTICKS) == (selection.POLICIES, selection.YARDSTICKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--keep", "0.3"], "--keep 0.3 says how much of --select"),
        (["generate", "--select", "best"], "--select must be one of scores, bounds, hip, got best"),
        (["generate", "--select", "oracle"], "--select must be one of scores, bounds, hip"),
        (["soak", "--select", "scores", "--keep", "0"], "--keep must be above 0 and at most 1"),
        (["serve", "--select", "hip", "--keep", "nan"], "--keep must be above 0 and at most 1"),
        (["generate", "--select", "hip", "--chunk-size", "6"], "do not divide a chunk of 6"),
        (["quality", "--select", "scores"], "takes POLICY:SHARE, such as scores:0.2, got scores"),
        (["quality", "--select", "scores:2"], "--keep must be above 0 and at most 1, got 2.0"),
        (["quality", "--select", "hip:0.2", "hip:0.2"], "--select must name each once"),
    ],
)
def test_what_no_engine_could_use_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.thorough
def test_quality_compares_choices_with_reading_all(tmp_path: Path):
    choices = "scores:1", "scores:0.3"
    sizes = {"window": 48, "windows": 4, "prefix": 256, "copy_lengths": (384,)}
    run(dataclasses.replace(SMALL, select=choices, output=tmp_path / "out", **sizes))
    result = read_result(tmp_path / "out")
    assert result.summary is not None
    exact, everything, scores = result.summary["codecs"]
    assert [one["reads"] for one in (exact, everything, scores)] == [
        "chunks",
        "scores 1",
        "scores 0.3",
    ]
    assert everything["divergence"] < 1e-9
    assert scores["divergence"] > 1e-3
    assert scores["bytes_per_token"] == everything["bytes_per_token"] > exact["bytes_per_token"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_token_reads_the_same_decoded_and_in_a_prompt(policy):
    """Windows of a text, a token of each a step; none begins a chunk but the first."""
    model = models.load("random:tiny").model
    tokens = np.random.default_rng(0).integers(1, 200, 256 + 6 * 40 + 1)
    passage = Passage.of(tokens.tolist(), 256, 40, 6)
    scorer = SharedScorer(
        model,
        passage,
        dtype="float32",
        chunk_size=16,
        selector=ChunkSelector(0.3, policy, whole=0),
        prefill_tokens=128,
    )
    decoded = scorer.decode().logprobs
    prefilled = compare(model, scorer.hidden(), scorer.hidden(), passage.targets).scores.logprobs
    np.testing.assert_allclose(decoded, prefilled, rtol=0, atol=1e-5)
    dense = SharedScorer(model, passage, dtype="float32", chunk_size=16).decode().logprobs
    assert np.abs(dense - decoded).max() > 1e-3
