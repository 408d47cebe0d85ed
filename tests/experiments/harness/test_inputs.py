"""What a run reads is told apart by what is in it: files, models, and what is no file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import models.hub
from experiments.cli import EXPERIMENTS, main
from experiments.generate.config import GenerateConfig
from experiments.harness import digests, environment
from experiments.harness.errors import UserError
from experiments.harness.inputs import changed_since, check_unchanged, inputs_of
from experiments.harness.reading import read_result
from experiments.harness.results import ResultFolder
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.quality.config import QualityConfig
from experiments.quality.run import _Scoring, shipped_text
from models.download import SMOLLM2
from tests.experiments.commands import run_instead
from tests.experiments.results import ENVIRONMENT
from tests.models.safetensors_writer import write_safetensors, write_sharded
from tests.models.tiny_checkpoint import write_checkpoint

WORDS = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja")
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def write_folder(folder: Path, value: float = 1.0) -> Path:
    """A checkpoint of two shards, and files that are none of its own."""
    write_sharded(folder, {shard: {shard[:11]: np.full(8, value, "<f4")} for shard in SHARDS})
    for name in WORDS:
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates" / "tool.jinja").write_text("")
    write_safetensors(folder / "consolidated.safetensors", {"other": np.zeros(8, "<f4")})
    (folder / "README.md").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder


def config_of(model: Path | str, **changes: Any) -> GenerateConfig:
    return GenerateConfig(model=str(model), **changes)


def changed(path: Path, data: bytes) -> None:
    """Other contents of the same size, with the time of the old ones, as `cp -p` leaves them."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_folder_is_all_that_decides_its_tokens(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    named = {str(Path(name).relative_to(folder)) for name in inputs_of(config_of(folder))}
    assert named == {*WORDS, *SHARDS, INDEX, "additional_chat_templates/tool.jinja"}
    assert inputs_of(config_of(folder / SHARDS[0])) == inputs_of(config_of(folder))
    (folder / "model.safetensors").write_bytes(b"x")  # which is taken instead of the shards
    found = inputs_of(config_of(folder))
    assert found[f"{folder}/model.safetensors"] == hashlib.sha256(b"x").hexdigest()
    assert not {f"{folder}/{shard}" for shard in SHARDS} & found.keys()


def test_a_gguf_file_is_itself_and_a_folder_that_is_none_what_it_has(tmp_path: Path):
    path = write_checkpoint(tmp_path / "tiny.gguf")
    assert inputs_of(config_of(path)) == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "config.json").write_text("{}")
    assert list(inputs_of(config_of(tmp_path))) == [f"{tmp_path}/config.json"]
    (tmp_path / INDEX).write_text("{")
    assert len(inputs_of(config_of(tmp_path))) == 2


def test_other_models_are_their_commit_or_what_is_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    folder = tmp_path / "snapshots" / "0123abc"
    monkeypatch.setattr(models.hub, "fetch_repository", lambda name: asked.append(name) or folder)
    for _ in range(2):
        assert inputs_of(config_of("org/name@main")) == {"org/name@main": "0123abc"}
    assert asked == ["org/name@main"]
    assert inputs_of(config_of("random:tiny")) == {}
    assert inputs_of(config_of("smollm2")) == {"smollm2": SMOLLM2.member_sha256}


@pytest.mark.parametrize("name", [*WORDS, SHARDS[1], "additional_chat_templates/tool.jinja"])
def test_a_run_over_a_model_that_has_changed_is_not_gone_on_with(tmp_path: Path, name: str):
    folder = write_folder(tmp_path / "m")
    config = config_of(folder, output=tmp_path / "out")
    with open_results("generate", config) as results:
        results.begin(ENVIRONMENT)
        results.finish_unit("this run", {"kind": "measured"})
    file = folder / name
    before = file.read_bytes()
    changed(file, before[:-1] + b"!" if before else before)
    if before:
        with pytest.raises(UserError, match=rf"results of .*{name} as it was then, and it has ch"):
            open_results("generate", config)
    file.unlink()
    with pytest.raises(UserError, match=rf"results of .*{name} as it was then, and it has changed"):
        open_results("generate", config)
    file.write_bytes(before)
    assert open_results("generate", config).finished


def test_a_command_begins_anew_with_a_model_that_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(environment, "describe_host", lambda: ENVIRONMENT)
    config = config_of(write_folder(Path("m")))
    with open_results("generate", config) as first:
        first.begin(ENVIRONMENT)
        first.finish_unit("this run", {"kind": "measured"})
    write_folder(Path("m"), 2.0)
    with open_results("generate", config) as second:
        assert second.path != first.path
        assert not second.finished
    write_folder(Path("m"), 1.0)
    with open_results("generate", config) as third:
        assert third.path == first.path
    header = read_result(first.path).header
    shard = Path("m") / SHARDS[0]
    assert header["inputs"][str(shard)] == hashlib.sha256(shard.read_bytes()).hexdigest()


def test_a_model_that_changes_while_it_is_loaded_is_refused(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    with open_results("generate", config_of(folder, output=tmp_path / "out")) as results:
        write_folder(folder, 2.0)
        with pytest.raises(UserError, match="has changed since this run began"):
            results.begin(ENVIRONMENT)
    assert not (tmp_path / "out").exists()


def test_each_type_of_a_quality_run_is_of_the_same_model(tmp_path: Path):
    path = write_checkpoint(tmp_path / "tiny.gguf")
    small = {**QualityConfig.SMOKE, "prefix": 16, "dtypes": ("float32", "float16")}
    config = QualityConfig(**{**small, "model": str(path)})
    scoring = _Scoring(config, parse_model(config.model), shipped_text(), inputs_of(config))
    scoring.score("float32", "plain")
    write_checkpoint(path, metadata={"general.name": "other"})
    with pytest.raises(UserError, match=r"tiny.gguf has changed since this run began"):
        scoring.score("float16", "plain")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all blocks that are digested."""
    sizes: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self._state = hashlib.sha256()

        def update(self, block: memoryview) -> None:
            sizes.append(len(block))
            self._state.update(block)

        def hexdigest(self) -> str:
            return self._state.hexdigest()

    monkeypatch.setattr(digests, "hashlib", SimpleNamespace(sha256=Counted))
    return sizes


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GenerateConfig]:
    """Configs that `generate` is run with, which leaves a result at once."""
    configs: list[GenerateConfig] = []
    monkeypatch.chdir(tmp_path)

    def run(config: GenerateConfig) -> dict[str, Any]:
        configs.append(config)
        with open_results("generate", config) as folder:
            folder.begin(ENVIRONMENT)
            folder.finish_unit("this run", {"kind": "measured"})
            numbers = ("decode_tokens_per_second", "kv_bytes_held", "kv_bytes_unshared")
            summary = {**dict.fromkeys(numbers, 1), "compare": None}
            folder.write_summary(summary)
        return summary

    run_instead(monkeypatch, "generate", run)
    return configs


SWEEP = ["generate", "--model", "m", "--sweep", "batch=1,2,3", "--output", "s"]


def test_a_sweep_digests_its_model_once(swept: list[GenerateConfig], read: list[int]):
    files = inputs_of(config_of(write_folder(Path("m"))))
    once = sum(os.path.getsize(file) for file in files)
    assert sum(read) == once
    assert main([*SWEEP, "--sweep", "seed=1,2"]) == 0
    assert len(swept) == 6
    assert sum(read) == once


def test_a_sweep_is_not_of_two_models(swept: list[GenerateConfig], monkeypatch, capsys):
    write_folder(Path("m"))
    run = EXPERIMENTS["generate"].run

    def run_and_train(config: GenerateConfig) -> dict[str, Any]:
        summary = run(config)
        write_folder(Path("m"), float(config.batch or 0))
        return summary

    run_instead(monkeypatch, "generate", run_and_train)
    assert main(SWEEP) == 2
    assert [config.batch for config in swept] == [1, 2]
    assert f"m/{SHARDS[0]} has changed since this run began" in capsys.readouterr().err
    assert main(SWEEP) == 2
    assert "as it was then, and it has changed" in capsys.readouterr().err


def test_repeating_a_run_says_what_has_changed(swept: list[GenerateConfig], capsys):
    write_folder(Path("m"))
    Path("q.txt").write_text("one")
    command = ["generate", "--model", "m", "--prompts", "q.txt", "--output", "a"]
    assert main(command) == 0
    assert main(["generate", "--from", "a", "--output", "b"]) == 0
    assert "is not what it was" not in capsys.readouterr().err
    Path("q.txt").write_text("two")
    write_folder(Path("m"), 2.0)
    (Path("m") / "chat_template.jinja").unlink()
    (Path("m") / "special_tokens_map.json").write_text("{}")
    assert main(["generate", "--from=a", "--output", "c"]) == 0
    told = capsys.readouterr().err.splitlines()
    files = ("chat_template.jinja", "special_tokens_map.json", *SHARDS)
    expected = {"q.txt", *(f"m/{name}" for name in files)}
    assert set(told) == {f"{name} is not what it was for a" for name in expected}
    options = ["--model", "random:tiny", "--prompts", "m/config.json"]  # others, so nothing to say
    assert main(["generate", "--from", "a", *options, "--output", "d"]) == 0
    assert capsys.readouterr().err == ""


def test_nothing_is_said_of_a_run_that_did_not_tell_its_model(tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    assert changed_since({"q.txt": "0"}, config_of(folder), ["model"]) == []
    check_unchanged(inputs_of(config_of(folder)), config_of(folder))


def test_what_is_no_file_is_never_gone_on_with(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    config = GenerateConfig("random:tiny", prompts=tmp_path / "pipe", output=tmp_path / "out")
    with open_results("generate", config) as results:
        results.begin(ENVIRONMENT)
        results.finish_unit("this run", {"kind": "measured"})
    with pytest.raises(UserError, match=r"of what .*pipe gave then, which is no file"):
        open_results("generate", config)


def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, monkeypatch):
    path = write_checkpoint(tmp_path / "tiny.gguf")

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"tiny.gguf cannot be read \(Permission denied\)"):
        ResultFolder(tmp_path / "out", "generate", config_of(path))
    assert not (tmp_path / "out").exists()


def test_all_commands_that_load_a_model_tell_it(tmp_path: Path):
    path = write_checkpoint(tmp_path / "tiny.gguf")
    loading = [
        one.config for one in EXPERIMENTS.values() if "model" in one.config.__dataclass_fields__
    ]
    assert len(loading) == 19
    for config_class in loading:
        assert list(inputs_of(dataclasses.replace(config_class(), model=str(path)))) == [str(path)]
