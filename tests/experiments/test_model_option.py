"""What `--model` may be: known names, paths, and names on the hub; and how it is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

import models
import models.hub
from experiments.cli import main
from experiments.harness.errors import UserError
from experiments.loading import (
    LoadOptions,
    ModelSource,
    fetch_model,
    load_fetched,
    load_model,
    parse_model,
)
from experiments.search import run as search_run
from tests.models.tiny_checkpoint import write_checkpoint


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The names asked of the hub, which has everything, in the working folder."""
    names: list[str] = []
    monkeypatch.setattr(models.hub, "fetch_repository", lambda name: names.append(name) or tmp_path)
    monkeypatch.setattr(models, "fetch_smollm2", lambda: tmp_path / "smollm2.gguf")
    monkeypatch.chdir(tmp_path)
    return names


def fetch(name: str) -> str | Path:
    return fetch_model(parse_model(name))


@pytest.mark.parametrize(
    "name",
    [
        "meta-llama/Llama-3.2-1B",
        "org/name.v0_2",
        "org/name@main",
        "org/name@refs/pr/12",
        "org/name@0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_other_names_with_one_slash_are_fetched_from_the_hub(fetched, tmp_path, name):
    assert fetch(name) == tmp_path
    assert fetched == [name]


@pytest.mark.parametrize("name", ["folder", "org/name", "a/b/c", "weights.bin", "odd name"])
def test_what_exists_is_a_path(fetched, name):
    Path(name).mkdir(parents=True)
    assert fetch(name) == Path(name)
    assert fetched == []


def test_home_is_expanded(fetched, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.gguf").touch()
    assert fetch("~/mine.gguf") == tmp_path / "mine.gguf"


def test_known_names_need_nothing_on_disk(fetched, tmp_path):
    assert fetch("smollm2") == tmp_path / "smollm2.gguf"
    assert fetch("random:tiny") == "random:tiny"
    assert fetched == []


def test_parsing_asks_nobody(fetched):
    assert parse_model("org/name") == ModelSource("org/name")
    assert parse_model("random:huge").is_random
    assert fetched == []


def test_an_unknown_preset_is_named():
    with pytest.raises(UserError, match="--model random:huge: unknown preset"):
        fetch("random:huge")


@pytest.mark.parametrize(
    "name",
    [
        "./a",
        "../org/name",
        "/org/name",
        "~/org",
        "~nobody/x",
        "a.gguf",
        "org/a.gguf",
        "a.safetensors",
        "a/b/c",
    ],
)
def test_a_path_where_nothing_is_is_no_hub_name(fetched, name):
    with pytest.raises(UserError, match="there is no such file or folder; expected smollm2, "):
        parse_model(name)


@pytest.mark.parametrize(
    "name", ["gpt5", "", "org/", "name@x", "org/na me", "org/name@", "Random:x"]
)
def test_anything_else_is_unknown(fetched, name):
    with pytest.raises(UserError, match=r"unknown model; expected smollm2, .*ORG/NAME"):
        parse_model(name)


# Loading.


def test_sequences_are_limited():
    loaded = load_model(parse_model("random:tiny"), LoadOptions(max_positions=100))
    assert loaded.config.max_positions == loaded.model.max_positions == 100


def test_a_file_that_has_gone_is_an_error_of_the_user(tmp_path):
    with pytest.raises(UserError, match=r"--model .*gone\.gguf cannot be read \(no such file"):
        load_fetched(tmp_path / "gone.gguf", LoadOptions())


LOADING = ("generate", "serve", "engine", "search", "soak")


def one_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command line ends with; no results are left."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not list(Path("runs").glob("*"))
    return captured.err


@pytest.mark.parametrize("command", LOADING)
def test_a_folder_without_weights_is_told_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    told = one_error([command, "--model", "empty"], capsys)
    assert "empty: no config.json; expected a folder" in told


@pytest.mark.parametrize("command", LOADING)
def test_a_download_that_fails_is_told_in_one_line(command, tmp_path, monkeypatch, capsys):
    def fetch_repository(name: str) -> Path:
        raise models.DownloadError(f"{name}: cannot reach the hub")

    monkeypatch.setattr(models.hub, "fetch_repository", fetch_repository)
    monkeypatch.chdir(tmp_path)
    assert "org/name: cannot reach" in one_error([command, "--model", "org/name"], capsys)


@pytest.mark.parametrize(
    ("command", "positions", "message"),
    [
        ("generate", 0, "--max-positions must be at least 1, got 0"),
        ("serve", 1, "--max-positions must be at least 2, for a prompt and an answer, got 1"),
        ("engine", 0, "--max-positions must be at least 1, got 0"),
        ("search", 0, "--max-positions must be at least 1, got 0"),
        ("soak", 0, "--max-positions must be at least 1, got 0"),
        ("generate", 40, "--max-tokens 48 are more than the model's 40 positions"),
        ("serve", 40, "takes 3 chunks of 16 tokens and the pool has 1"),
        ("engine", 40, "make 2129 positions, random:tiny has 40"),
        ("soak", 40, "random:tiny with 40 positions is too small for a soak, which needs 64"),
    ],
)
def test_max_positions_reach_the_model(command, positions, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model", "random:tiny", "--max-positions", str(positions)]
    if command == "serve":
        options += ["--pool-chunks", "1"]
    assert message in one_error([command, *options], capsys)


@pytest.mark.slow
def test_a_search_is_limited_before_it_writes(smollm2_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--model", str(smollm2_path), "--max-positions", "40"]
    assert "the model's 40 positions" in one_error(["search", *options], capsys)


@pytest.mark.parametrize("command", ["generate", "search"])
def test_a_model_that_takes_no_chats_is_refused(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("base.gguf"), metadata={"tokenizer.chat_template": None})
    error = one_error([command, "--model", "base.gguf"], capsys)
    assert "(this checkpoint carries no chat template); choose a model whose" in error


def test_a_search_needs_a_tokenizer(tmp_path, monkeypatch, capsys):
    without = load_model(parse_model("random:tiny"))
    monkeypatch.setattr(search_run, "load_model", lambda *_: without)
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    error = one_error(["search", "--model", "model.gguf"], capsys)
    assert "--model model.gguf has no tokenizer, which a search needs" in error
