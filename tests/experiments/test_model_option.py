"""What `--model` may be: known names, paths, and names on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest

import models.hub
from experiments.errors import UserError
from experiments.loading import ModelSource, fetch_model, parse_model


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
