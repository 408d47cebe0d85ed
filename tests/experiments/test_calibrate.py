"""`python -m experiments calibrate`, small, and what takes the files that it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import models
from experiments.calibrate import run as calibrate_run
from experiments.calibrate.command import headline, run
from experiments.calibrate.config import CalibrateConfig, check
from experiments.cli import main
from experiments.codecs import codec_for, codec_named
from experiments.generate import run as generate_run
from experiments.harness.errors import UserError
from experiments.harness.inputs import inputs_of
from experiments.harness.reading import read_result
from experiments.harness.views import views_of
from experiments.prompts import python_help, second_half
from experiments.search.config import SearchConfig
from models.calibration import load_codec, read_codec
from pallas_kernels.codecs import CodecError

SMALL: dict[str, Any] = {**CalibrateConfig.SMOKE, "codec": ("nuq3", "nuq4/nuq2")}


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    run(CalibrateConfig(**SMALL, output=folder))
    return folder


def test_each_codec_is_in_a_file(calibrated: Path):
    result = read_result(calibrated)
    files = {path.name for path in calibrated.iterdir()}
    assert files == {
        "nuq3.safetensors",
        "nuq4-nuq2.safetensors",
        "results.jsonl",
        "summary.json",
    }
    assert result.summary is not None
    first, second = result.summary["codecs"]
    assert (first["codec"], second["codec"]) == ("nuq3-1%", "nuq4/nuq2-1%")
    model = models.load("random:tiny").model
    for one in (first, second):
        codec = load_codec(calibrated / one["file"], model)
        assert codec.name == one["codec"]
        assert one["bytes_per_token"] == codec.head_bytes(64, 16) * 4 / 64
    # Codes, 11 outliers and the first token, of keys and values; where the chunk is; ranges.
    of_head = 2 * (384 + 11 * 4 + 32) + 4 + 64 * 4
    assert headline(result.summary) == {"codec": "nuq3-1%", "bytes per token": of_head * 4 / 64}
    [table] = views_of("calibrate").tables(result)
    assert [row[0] for row in table.rows] == [first["file"], second["file"]]
    assert "128 tokens in 2 windows of 64" in str(table.notes)


def test_windows_are_spread_over_the_text(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 30)
    folder = tmp_path / "out"
    run(CalibrateConfig(**{**SMALL, "windows": 3, "codec": ("nuq4",)}, text=text, output=folder))
    begins = [one["begin"] for one in read_result(folder).of_kind("window")]
    assert begins == [0, 118, 236]
    assert python_help().endswith(second_half(python_help()))
    assert 0.45 < len(second_half(python_help())) / len(python_help()) < 0.55


def test_a_run_that_was_broken_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calibrated: Path
):
    """While its second codec is fitted: no window is read again, and the first is not fitted."""
    fitted, whole = [], calibrate_run.fit
    config = CalibrateConfig(**SMALL, output=tmp_path / "out")

    def broken_off(recipe, *args):
        if len(fitted) == 1:
            raise KeyboardInterrupt
        fitted.append(recipe.name)
        return whole(recipe, *args)

    def never(*args):
        raise AssertionError("read again")

    monkeypatch.setattr(calibrate_run, "fit", broken_off)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
        run(config)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npz")) == [
        "window-000.npz",
        "window-001.npz",
    ]
    monkeypatch.setattr(calibrate_run, "fit", whole)
    monkeypatch.setattr(calibrate_run, "sample", never)
    run(config)
    assert fitted == ["nuq3-1%"]
    for name in ("nuq3.safetensors", "nuq4-nuq2.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (calibrated / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.npz"))


def test_samples_that_are_gone_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken_off(*args):
        raise KeyboardInterrupt

    config = CalibrateConfig(**SMALL, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(calibrate_run, "fit", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    (tmp_path / "out" / "window-001.npz").unlink()
    with pytest.raises(UserError, match=r"window-001\.npz.* cannot be read .*--fresh"):
        run(config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"windows": 0}, "--windows must be at least 1"),
        ({"codec": ()}, "--codec must name one codec or more, each once, got none"),
        ({"codec": ("nuq3", "nuq3")}, "each once, got nuq3 nuq3"),
        ({"outliers": 1.0}, "--outliers must be at least 0 and below 1, got 1.0"),
        ({"window": 16}, "are too few to fit anything: 64 at least"),
        ({"max_positions": 32}, "--window makes 64 positions, random:tiny has 32"),
    ],
)
def test_values_that_no_run_could_use(values: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        run(CalibrateConfig(**{**SMALL, **values}, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_and_codecs_that_need_no_calibration(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("short")
    with pytest.raises(UserError, match="the text has 5 tokens of random:tiny, --window takes 64"):
        run(CalibrateConfig(**SMALL, text=text, output=tmp_path / "out"))
    with pytest.raises(CodecError, match="unknown codec 'int4'; to be calibrated: nuq4"):
        check(CalibrateConfig(codec=("int4",)))


def test_a_name_that_needs_a_file_says_how_to_make_one(capsys: pytest.CaptureFixture[str]):
    assert main(["generate", "--codec", "nuq4"]) == 2
    assert "`python -m experiments calibrate --codec nuq4` writes a file" in capsys.readouterr().err


def test_files_stand_for_codecs(calibrated: Path):
    path = str(calibrated / "nuq3.safetensors")
    model = models.load("random:tiny").model
    assert codec_for("int4", model) == "int4"
    assert codec_for(path, model) == codec_named(path) == read_codec(path).codec
    config = SearchConfig(model="random:tiny", codec=path)
    assert list(inputs_of(config)) == [path]
    assert inputs_of(SearchConfig(model="random:tiny", codec="int4")) == {}


def test_an_engine_gets_the_codec_of_a_file_for_its_model(
    calibrated: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    path = str(calibrated / "nuq3.safetensors")
    given = []

    def decode_batch(model, prompts, sampling, settings, *args, **kwargs):
        given.append(settings.codec)
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_run, "decode_batch", decode_batch)
    generate = ["generate", "--smoke", "--model", "random:tiny", "--codec", path]
    assert main([*generate, "--output", str(tmp_path / "out")]) == 130
    assert given == [read_codec(path).codec]
    capsys.readouterr()
    assert main([*generate, "--seed", "1", "--output", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == (
        f"error: {path} was calibrated for another model of the same sizes: its embedding is "
        "another\n"
    )


def test_a_file_that_was_cut_is_refused_before_a_model_is_loaded(
    calibrated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((calibrated / "nuq3.safetensors").read_bytes()[:-1])
    for command in ("generate", "serve", "search", "soak", "quality", "cache"):
        assert main([command, "--codec", str(cut), "--output", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: no codec can be read from {cut}: the file is truncated")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
