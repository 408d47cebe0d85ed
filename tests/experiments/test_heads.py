"""`python -m experiments heads`, small, and the option `--heads`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from experiments.cli import main
from experiments.generate import run as generate_run
from experiments.generate.config import GenerateConfig
from experiments.harness.errors import UserError
from experiments.harness.inputs import inputs_of
from experiments.harness.reading import read_result
from experiments.harness.views import views_of
from experiments.heads import run as heads_run
from experiments.heads.command import headline, run
from experiments.heads.config import HeadsConfig, check
from experiments.heads.training_texts import copied_text
from models.head_patterns import GateTraining, HeadPattern, load_pattern, write_pattern
from tests.experiments.results import text_of

LEARNING: dict[str, Any] = {**HeadsConfig.SMOKE, "patterns": ("learned",), "shares": ()}
RUNNING = ("generate", "serve", "search", "soak", "quality", "decode", "engine")
"""The commands that run a model with `--heads`."""


@pytest.fixture
def pattern(tmp_path: Path) -> Path:
    """A folder with a pattern of the tiny model."""
    folder = tmp_path / "pattern"
    scores = HeadPattern.of([[0.1, 0.2], [0.3, 0.4]], sinks=8, recent=32)
    write_pattern(folder, scores, models.load("random:tiny").model, {})
    return folder


@pytest.mark.slow
def test_patterns_are_written_and_each_share_of_them_is_measured(tmp_path: Path):
    folder = tmp_path / "out"
    summary = run(HeadsConfig(**HeadsConfig.SMOKE, output=folder))
    assert summary["patterns"] == ["scored", "learned", "random-1"]
    assert {path.name for path in folder.iterdir() if not path.name.startswith("heads.")} == {
        *summary["patterns"],
        "results.jsonl",
        "summary.json",
    }
    result = read_result(folder)
    model = models.load("random:tiny").model
    scores = {one["pattern"]: one["scores"] for one in result.of_kind("pattern")}
    for name in summary["patterns"]:
        loaded = load_pattern(folder / name, model)
        assert loaded == HeadPattern.of(scores[name], sinks=8, recent=32)
    whole, *others = summary["measured"]
    assert (whole["pattern"], whole["share"], whole["divergence"]) == ("all heads", 1, 0)
    assert whole["kept_bytes"] == {"192": 192 * 2 * 2 * 2 * 16 * 4}
    assert [one["pattern"] for one in others] == summary["patterns"]
    for one in others:
        assert one["kept_bytes"] == {"192": (192 + 40) * 2 * 2 * 16 * 4}
        assert one["divergence"] > 0
    assert headline(summary)["pattern"] == "scored"
    text = text_of(views_of("heads").tables(result))
    assert "random-1" in text
    assert "mean gate" in text


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded of gates and patterns, but for times."""
    result = read_result(folder)
    return [
        {name: value for name, value in one.items() if name != "seconds"}
        for one in (*result.of_kind("gates"), *result.of_kind("pattern"))
    ]


@pytest.mark.slow
def test_gates_that_were_broken_off_go_on_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the third of three steps, behind two that were saved."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = run(HeadsConfig(**LEARNING, output=whole))
    assert headline(summary) == {"patterns": "learned"}
    assert [one["step"] for one in steps_of(whole)[:2]] == [2, 3]
    taken, step = [], GateTraining.step

    def broken_off(training: GateTraining, *given):
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(step(training, *given))
        return taken[-1]

    config = HeadsConfig(**LEARNING, output=broken)
    with monkeypatch.context() as patch:
        patch.setattr(GateTraining, "step", broken_off)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
            run(config)
    assert [path.name for path in broken.glob("*.npz")] == ["gates-000002.npz"]
    run(config)
    assert steps_of(broken) == steps_of(whole)
    assert not list(broken.glob("*.npz"))
    for name in ("full_attention_heads.tsv", "config.json"):
        assert (broken / "learned" / name).read_bytes() == (whole / "learned" / name).read_bytes()


def test_strings_are_hidden_and_copied_behind_the_text():
    tokens = np.arange(1000)
    random = np.random.default_rng(0)
    copied, labels = copied_text(tokens, length=400, strings=3, random=random)
    assert copied.dtype == labels.dtype == np.int32
    assert len(copied) == 400
    text, copies = copied[:304], copied[304:].reshape(3, 32)
    windows = np.lib.stride_tricks.sliding_window_view(text, 32)
    begins = [np.flatnonzero((windows == one).all(axis=1)) for one in copies]
    assert [len(found) for found in begins] == [1, 1, 1]
    assert all(15 <= found[0] <= 288 - 32 for found in begins)
    expected = [304 + 32 * copy + place for copy in range(3) for place in range(7, 31)]
    assert labels.tolist() == expected
    again, _ = copied_text(tokens, length=400, strings=3, random=np.random.default_rng(0))
    np.testing.assert_array_equal(again, copied)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patterns": ()}, "--patterns must name one or more"),
        ({"patterns": ("scored", "scored")}, "each once, got scored scored"),
        ({"shares": (1.0,)}, "--shares must be from 0 to below 1"),
        ({"shares": (0.5, 0.5)}, "--shares .* got 0.5 0.5"),
        ({"sinks": -1}, "--sinks must be 0 or more"),
        ({"recent": 0}, "--recent must be at least 1"),
        ({"rate": 0.0}, "--rate must be a number above 0"),
        ({"penalty": float("nan")}, "--penalty must be a number above 0"),
        ({"length": 100}, "--length must be 1,920 tokens at least"),
        ({"learn_length": 300}, "--learn-length must be 384 tokens at least"),
        ({"prefix": 100}, "--prefix must be a multiple"),
        ({"copy_lengths": (100,)}, "--copy-lengths must be whole chunks"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_that_no_run_could_use_are_refused(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        check(HeadsConfig(**options))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"copy_lengths": (4096,)}, "longest of --copy-lengths, makes 4,128 positions"),
        ({"length": 2048}, "--length makes 2,080 positions"),
        ({"patterns": ("learned",), "learn_length": 4096}, "--learn-length makes 4,096 positions"),
    ],
)
def test_more_positions_than_the_model_has_are_refused(
    tmp_path: Path, options: dict[str, Any], words: str
):
    sizes = {**HeadsConfig.SMOKE, "patterns": ("random",), "max_positions": 1024}
    if "length" in options:
        sizes["patterns"] = ("scored",)
    with pytest.raises(UserError, match=words):
        run(HeadsConfig(**{**sizes, **options}, output=tmp_path / "out"))


def test_a_text_that_is_too_short_is_refused(tmp_path: Path):
    (tmp_path / "text.txt").write_text("Too short. " * 30)
    config = HeadsConfig(**HeadsConfig.SMOKE, text=tmp_path / "text.txt")
    for patterns, words in ((("scored",), "the second half .* 165 tokens"), (("random",), "first")):
        one = dataclasses.replace(config, patterns=patterns, output=tmp_path / patterns[0])
        with pytest.raises(UserError, match=words):
            run(one)


def test_an_engine_gets_a_model_with_the_pattern(
    pattern: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    given = []

    def decode_batch(model, *args, **kwargs):
        given.append(model.cache_spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_run, "decode_batch", decode_batch)
    spec = models.load("random:tiny").model.cache_spec
    generate = ["generate", "--smoke", "--heads", str(pattern)]
    for share in ("0.5", "0.25", "1"):
        out = ["--output", str(tmp_path / share)]
        assert main([*generate, "--head-share", share, *out]) == 130
        expected = load_pattern(pattern, models.load("random:tiny").model)
        assert given.pop().windows == expected.windows(spec, float(share))
    capsys.readouterr()
    assert main([*generate, "--seed", "1", "--output", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == (
        f"error: {pattern}: the pattern was made for another model of the same sizes: its "
        "embedding is another\n"
    )


def test_a_pattern_is_an_input_of_what_runs_with_it(pattern: Path):
    table = pattern / "full_attention_heads.tsv"
    config = GenerateConfig("random:tiny", heads=pattern)
    before = inputs_of(config)
    assert before.keys() == {str(table), str(pattern / "config.json")}
    assert inputs_of(dataclasses.replace(config, heads=table)) == before
    table.write_text("1\t1\n1\t1\n")
    assert inputs_of(config)[str(table)] != before[str(table)]


def test_heads_that_no_model_could_use_are_refused_before_one_is_loaded(
    pattern: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "wrong").mkdir()
    (tmp_path / "wrong" / "full_attention_heads.tsv").write_text("0.5\tmany\n")
    (tmp_path / "wrong" / "config.json").write_text(json.dumps({"sink_size": 1}))
    cases = (
        (["--heads", str(tmp_path / "none")], "no head pattern can be read from"),
        (["--heads", str(tmp_path / "wrong")], f"{tmp_path / 'wrong'} has no head pattern"),
        (["--heads", str(pattern), "--head-share", "1.5"], "--head-share must be from 0 to 1"),
        (["--heads", str(pattern), "--head-share", "nan"], "--head-share must be from 0 to 1"),
        (["--head-share", "0.5"], "--head-share 0.5 says how many of --heads"),
    )
    runs = [("generate", *case) for case in cases] + [(name, *cases[0]) for name in RUNNING[1:]]
    for command, options, words in runs:
        assert main([command, *options, "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {words}")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_was_saved_and_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken_off(*given):
        raise KeyboardInterrupt

    config = HeadsConfig(**LEARNING, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(heads_run, "write_pattern", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    (tmp_path / "out" / "gates-000003.npz").unlink()
    with pytest.raises(UserError, match=r"gates-000003\.npz cannot be read .*--fresh"):
        run(config)
