"""`python -m experiments quality`, small."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import chex
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.cli import main
from experiments.harness.errors import UserError
from experiments.harness.reading import Result, read_result
from experiments.quality import run as quality_run
from experiments.quality import views as quality_views
from experiments.quality.codecs import compare, copied, copy_passage
from experiments.quality.command import headline, run
from experiments.quality.config import SHOWN, STRING, QualityConfig, check, sizes_of
from experiments.quality.measures import PATHS, measures_of
from experiments.quality.scoring import Passage, Scores, SharedScorer, score_plain
from models.calibration import fit, key_frequencies, recipe_of, sample, write_codec

SMALL = QualityConfig(**QualityConfig.SMOKE)
SIZES = sizes_of(SMALL)
CODECS = dataclasses.replace(SMALL, codec=("int4",), window=48, windows=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("quality") / "run"
    run(dataclasses.replace(SMALL, output=folder))
    return folder


@pytest.mark.slow
def test_nothing_is_lost_in_float32(finished: Path):
    result = read_result(finished)
    assert result.summary is not None
    paths = result.summary["dtypes"][0]["paths"]
    assert list(paths) == list(PATHS)
    assert result.summary["plan"]["shared"]
    assert result.summary["plan"]["chunk_reads"] < result.summary["plan"]["unshared_chunk_reads"]
    for path in ("prefill", "decode"):
        assert paths[path]["largest_difference"] < 2e-5
        assert paths[path]["perplexity"] == pytest.approx(paths["plain"]["perplexity"], rel=1e-6)
        assert paths[path]["greedy_agreement"] == 1.0
    for record in result.of_kind("score"):
        logprobs = np.asarray(record["logprobs"])
        chex.assert_shape(logprobs, (SIZES.windows, SIZES.window))
        assert (logprobs < 0).all()
    assert headline(result.summary)["perplexity, plain"] == paths["plain"]["perplexity"]


@pytest.mark.slow
def test_a_model_that_computes_nan_is_shown_as_such(finished: Path):
    result = read_result(finished)
    lines = [
        {**line, "logprobs": [[math.nan] * SIZES.window] * SIZES.windows}
        if line["kind"] == "score" and line["path"] == "plain"
        else line
        for line in result.lines
    ]
    changed = dataclasses.replace(result, lines=lines)
    [table] = quality_views.tables(changed)
    assert [row[2] == "nan" for row in table.rows] == [True, False, False]
    assert quality_views.figures(changed)


def test_the_shared_prefix_counts():
    """Behind another prefix the same windows have other probabilities, in the pool as without."""
    model = models.load("random:tiny").model
    text = list(quality_run.shipped_text().encode())
    passage = Passage.of(text, SIZES.prefix, SIZES.window, SIZES.windows)
    other = dataclasses.replace(passage, prefix=passage.prefix[::-1].copy())
    plain, changed = (score_plain(model, each, "float32").logprobs for each in (passage, other))
    scorer = SharedScorer(model, other, dtype="float32", chunk_size=16, prefill_tokens=32)
    chex.assert_trees_all_close(scorer.decode().logprobs, changed, rtol=0, atol=2e-5)
    assert np.abs(changed - plain).max() > 0.1


def test_a_run_that_was_broken_off_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = (finished / "results.jsonl").read_text().splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:3]))

    def no_plain_pass(*_: object) -> Scores:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality_run, "score_plain", no_plain_pass)
    run(dataclasses.replace(SMALL, output=folder))
    again = read_result(folder)
    assert untimed(again) == untimed(read_result(finished))


def untimed(result: Result) -> list[Any]:
    return [table.untimed() for table in quality_views.tables(result)]


def test_a_table_and_a_picture(finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    result = read_result(finished)
    (table,) = quality_views.tables(result)
    assert [row[1] for row in table.rows] == [quality_views.NAMES[path] for path in PATHS]
    assert "28 of 32 chunk reads saved" in " ".join(table.notes)
    assert list(quality_views.figures(result)) == ["quality"]
    assert (finished / "quality.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "clear"), [("int8", 0.1), ("int4", 0.5)])
def test_what_a_codec_changes_does_not_hang_on_how_it_was_computed(codec: str, clear: float):
    """Prefill in calls of 128 tokens and of 32, against no codec. Rounding that moves a code is
    measured to change less than a thousandth of what the codec does; a token that read a chunk as
    it is, and not encoded, would change about as much."""
    model = models.load("random:tiny").model
    passage = Passage.of(list(quality_run.shipped_text().encode()), 64, 96, 4)

    def hidden(codec: str, prefill_tokens: int) -> np.ndarray:
        scorer = SharedScorer(
            model,
            passage,
            dtype="float32",
            chunk_size=16,
            codec=codec,
            prefill_tokens=prefill_tokens,
        )
        return scorer.hidden()

    exact, cold, pieces = hidden("identity", 128), hidden(codec, 128), hidden(codec, 32)
    of_codec = compare(model, exact, cold, passage.targets)
    of_history = compare(model, cold, pieces, passage.targets)
    assert of_codec.divergence.mean() > 1e-6
    assert abs(of_history.divergence.mean()) <= 0.05 * of_codec.divergence.mean()
    flat = model.logits(jnp.asarray(exact).reshape(-1, exact.shape[-1]))
    logits = np.asarray(flat).reshape(*exact.shape[:2], -1)
    second, first = np.moveaxis(np.sort(logits, axis=-1)[..., -2:], -1, 0)
    is_clear = first - second > clear
    assert is_clear.mean() > 0.1
    for found in (of_codec, of_history):
        np.testing.assert_array_equal(found.scores.greedy[is_clear], logits.argmax(-1)[is_clear])


@pytest.fixture(scope="module")
def codecs_compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run with `--codec`, of a name and a file."""
    folder = tmp_path_factory.mktemp("codecs")
    model = models.load("random:tiny").model
    tokens = np.random.default_rng(0).integers(0, 128, 256).astype(np.int32)
    frequencies = key_frequencies(model.config)
    codec = fit(recipe_of("nuq2"), sample(model, tokens, 1), frequencies)
    file = folder / "nuq2.safetensors"
    write_codec(file, codec, model)
    run(dataclasses.replace(CODECS, codec=("int4", str(file)), output=folder / "run"))
    return folder / "run"


@pytest.mark.slow
def test_codecs_are_compared_with_none(codecs_compared: Path):
    result = read_result(codecs_compared)
    assert result.summary is not None
    identity, int4, as_kivi, nuq2, as_kvquant = result.summary["codecs"]
    assert [one["reads"] for one in result.summary["codecs"]] == [
        "chunks",
        "chunks",
        "as KIVI",
        "chunks",
        "as KVQuant",
    ]
    for value, none in (("divergence", 0), ("perplexity_change", 0), ("same_token", 1)):
        assert identity[value] == pytest.approx(none, abs=1e-7)
    assert identity["answers"] == 1.0  # what prefill and decoding find likeliest is the same
    assert 1e-4 < int4["divergence"] < 0.05
    spec = models.load("random:tiny").model.cache_spec
    numbers = spec.num_layers * spec.num_kv_heads * spec.head_dim
    assert identity["bytes_per_token"] == 2 * numbers * 4
    # A byte for two codes, two float16 for a group of 16, and of a chunk's first key 4 bits more.
    assert int4["bytes_per_token"] == numbers * (2 * (0.5 + 4 / 16) + 0.5 / 16)
    # Everything is within 128 tokens, which KIVI keeps.
    assert as_kivi["divergence"] == pytest.approx(0, abs=1e-6)
    # More is encoded, so more is off.
    assert int4["divergence"] < nuq2["divergence"] < as_kvquant["divergence"]
    assert set(int4["copied"]) == {"192"}
    [table] = quality_views.tables(result)
    assert [row[0] for row in table.rows] == ["identity", "int4", "int4", "nuq2-1%", "nuq2-1%"]
    assert (codecs_compared / "quality.png").stat().st_size > 10_000
    assert headline(result.summary)["same_token"] == int4["same_token"]


def test_strings_are_hidden_where_they_are_looked_for():
    text = list(range(1000, 1500))
    passage = copy_passage(text, length=480, strings=2, seed=0)
    assert passage.prefix.shape == (480,)
    strings = np.concatenate([passage.inputs, passage.targets[:, -1:]], axis=1)
    found = [
        begin
        for string in strings
        for begin in range(480 - STRING + 1)
        if (passage.prefix[begin : begin + STRING] == string).all()
    ]
    assert found == [0, 64, 176, 240, 352, 416]
    half = passage.targets.copy()
    half[:, SHOWN - 1 :: 2] += 1
    assert copied(passage, passage.targets) == [1.0] * 3
    assert copied(passage, half) == [0.5] * 3


def test_measures_follow_from_the_log_probabilities():
    half = float(np.log(0.5))
    records = [
        {"dtype": "float16", "path": path, "logprobs": [logprobs], "greedy": [greedy]}
        for path, logprobs, greedy in (
            ("plain", [half, half], [1, 2]),
            ("decode", [half, half - 0.2], [1, 3]),
        )
    ]
    plain, shared = measures_of(records)
    assert plain.perplexity == pytest.approx(2)
    assert shared.perplexity == pytest.approx(2 * np.exp(0.1))
    assert shared.difference == pytest.approx(shared.perplexity - 2)
    assert shared.largest_difference == pytest.approx(0.2)
    assert shared.mean_difference == pytest.approx(0.1)
    assert shared.greedy_agreement == 0.5
    assert shared.mean_error is None  # without a plain pass in float32


def test_windows_follow_one_another_behind_the_prefix():
    passage = Passage.of(range(100), prefix=4, window=3, windows=2)
    assert passage.prefix.tolist() == [0, 1, 2, 3]
    assert passage.inputs.tolist() == [[4, 5, 6], [7, 8, 9]]
    assert passage.targets.tolist() == [[5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windows": 0}, "--windows must be at least 1"),
        ({"prefix": 65}, "--prefix must be a multiple of --chunk-size 16"),
        ({"dtypes": ()}, "--dtypes must name one type or more"),
        ({"dtypes": ("float32", "float32")}, "each once, got float32 float32"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"codec": ("int4", "int4")}, "--codec must name each codec once"),
        ({"codec": ("identity",)}, "all are compared with identity"),
        (
            {"codec": ("int4",), "dtypes": ("float32", "float16")},
            "--codec and --select take one of --dtypes",
        ),
        ({"codec": ("int4",), "window": 32, "chunk_size": 64, "prefix": 64}, "--prefill-tokens"),
        ({"codec": ("int4",), "window": 32, "copy_lengths": (900,)}, "--copy-lengths must be"),
    ],
)
def test_what_no_run_could_use_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "absent.txt"], "text absent.txt: No such file"),
        (["--windows", "5000"], "the text has 8,100 tokens"),
        (["--prefix", "1024"], "make 1036 positions, random:tiny has 1024"),
        (["--windows", "1"], "the plan shares nothing"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = ["--model", "random:tiny", "--prefix", "64", "--window", "12", "--windows", "4"]
    small += ["--chunk-size", "16", "--dtypes", "float32", "--output", str(tmp_path / "out")]
    assert main(["quality", *small, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
