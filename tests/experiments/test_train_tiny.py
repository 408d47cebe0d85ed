"""`python -m experiments train-tiny`, small, and what takes the folder that it writes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from experiments.cli import main
from experiments.harness.errors import UserError
from experiments.harness.reading import read_result
from experiments.harness.views import views_of
from experiments.prompts import python_help
from experiments.train_tiny import run as train_run
from experiments.train_tiny.command import headline, run
from experiments.train_tiny.config import TrainTinyConfig, check
from models.training import Training
from tests.experiments.results import text_of

SMALL: dict[str, Any] = TrainTinyConfig.SMOKE
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(TrainTinyConfig(**SMALL, output=folder))
    return folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What was recorded, but for times."""
    result = read_result(folder)
    return [
        {name: value for name, value in one.items() if name != "seconds"}
        for one in (*result.of_kind("steps"), *result.of_kind("model"))
    ]


@pytest.mark.slow
def test_a_run_leaves_a_checkpoint_and_tells_how_good_it_is(trained: Path):
    result = read_result(trained)
    assert {path.name for path in (trained / "model").iterdir()} == FILES
    assert not list(trained.glob("*.npz"))
    loaded = models.load(trained / "model")
    assert loaded.config.num_layers == 2
    assert loaded.config.num_heads == loaded.config.num_kv_heads == 4
    summary = result.summary
    assert summary is not None
    assert (summary["steps_done"], summary["bytes_read"]) == (4, 4 * 2 * 64)
    assert summary["parameters"] == models.num_parameters(loaded.config)
    assert summary["perplexity"] == pytest.approx(2 ** summary["bits_per_byte"])
    assert summary["scored"] == 7 * 64  # the first of the bytes is not predicted
    assert headline(summary)["steps_done"] == 4
    assert [one["step"] for one in result.of_kind("steps")] == [2, 4]
    text = text_of(views_of("train-tiny").tables(result))
    assert "GPT-2, 2 layers of 4 heads, 32 wide" in text
    assert "over 448 bytes held out" in text
    assert list(views_of("train-tiny").figures(result)) == ["loss"]


def test_what_is_held_out_is_the_beginning_and_all_else_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """512 bytes are held out, and of 1,000 others 14 sequences of 64 are cut."""
    read: list[np.ndarray] = []
    scored: list[np.ndarray] = []
    text = python_help().encode()[:1512].decode()

    def step(training: Training, sequences: np.ndarray, begins: np.ndarray) -> float:
        assert not begins.any()
        read.extend(sequences)
        return 1.0

    def losses(training: Training, sequences: np.ndarray) -> np.ndarray:
        scored.extend(sequences)
        return np.zeros((len(sequences), sequences.shape[1] - 1), np.float32)

    monkeypatch.setattr(Training, "step", step)
    monkeypatch.setattr(Training, "losses", losses)
    (tmp_path / "text.txt").write_text(text)
    config = TrainTinyConfig(
        **{**SMALL, "steps": 14, "save_every": 14, "short_share": 0.0},
        text=tmp_path / "text.txt",
        output=tmp_path / "out",
    )
    run(config)
    pieces = [bytes(one.tolist()).decode() for one in read]
    assert len(pieces) == 28
    for first in (pieces[:14], pieces[14:]):
        begins = sorted(text.index(one) for one in first)
        assert begins[0] >= 512
        assert all(later - one == 64 for one, later in itertools.pairwise(begins))
    assert pieces[:14] != sorted(pieces[:14], key=text.index)
    assert {*pieces[:14]} != {*pieces[14:]}
    held = [bytes(one.tolist()).decode(errors="replace") for one in scored if one.any()]
    assert held[:7] == [text[at : at + 65] for at in range(0, 7 * 64, 64)]


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Path
):
    """In the fourth of four steps, behind two that were saved."""
    taken, step = [], Training.step

    def broken_off(training: Training, *given: np.ndarray) -> float:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(step(training, *given))
        return taken[-1]

    config = TrainTinyConfig(**SMALL, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", broken_off)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on from there"):
            run(config)
    assert [path.name for path in (tmp_path / "out").glob("*.npz")] == ["state-000002.npz"]
    run(config)
    assert steps_of(tmp_path / "out") == steps_of(trained)
    assert not list((tmp_path / "out").glob("*.npz"))
    for name in FILES:
        again, whole = (folder / "model" / name for folder in (tmp_path / "out", trained))
        assert again.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_state_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken_off(*args):
        raise KeyboardInterrupt

    config = TrainTinyConfig(**SMALL, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(train_run, "write_byte_gpt2", broken_off)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    (tmp_path / "out" / "state-000004.npz").unlink()
    with pytest.raises(UserError, match=r"state-000004\.npz cannot be read .*--fresh"):
        run(config)


def test_the_time_may_be_bounded(tmp_path: Path):
    summary = run(TrainTinyConfig(**SMALL, minutes=1e-6, output=tmp_path / "out"))
    assert summary["steps_done"] == 2
    assert models.load(tmp_path / "out" / "model").config.hidden_size == 32


@pytest.mark.slow
@pytest.mark.thorough
def test_other_commands_take_the_folder(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "prompt.txt").write_text("Help on Python.")
    model = ["--model", str(trained / "model")]
    sizes = ["--system-prompt", str(tmp_path / "prompt.txt"), "--batch", "1", "--max-tokens", "2"]
    (tmp_path / "questions.txt").write_text("Why?\n")
    sizes += ["--prompts", str(tmp_path / "questions.txt"), "--chunk-size", "8"]
    assert main(["generate", *model, *sizes, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "--steps must be at least 1"),
        ({"hidden": 33}, "--hidden must be a multiple of --heads 4, got 33"),
        ({"held_out": 64}, "--held-out must be more than --context 64, got 64"),
        ({"short": 24}, "--short must divide --context 64, got 24"),
        ({"short_share": 1.5}, "--short-share must be from 0 to 1, got 1.5"),
        ({"warmup": 5}, "--warmup must be from 0 to --steps 4, got 5"),
        ({"warmup": -1}, "--warmup must be from 0"),
        ({"rate": 0.0}, "--rate must be a number above 0"),
        ({"minutes": -1.0}, "--minutes must be a number above 0"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_that_no_run_could_use(values: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(replace(TrainTinyConfig(**SMALL), **values))


def test_a_text_that_is_too_short_is_refused(tmp_path: Path):
    (tmp_path / "text.txt").write_text("Too short. " * 30)
    config = TrainTinyConfig(**SMALL, text=tmp_path / "text.txt", output=tmp_path / "out")
    with pytest.raises(UserError, match=r"the text has 330 bytes, and --held-out 512 .* needs 641"):
        run(config)
    assert not (tmp_path / "out").exists()
