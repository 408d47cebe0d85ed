"""Every command of the README runs, in its smoke form."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import pytest

import models.hub
from experiments.cli import COMMANDS, EXPERIMENTS, main
from experiments.compile_report.target import check_installed as check_compiler
from experiments.endpoint.command import check_installed as check_server
from experiments.harness.compilations import compilation_cache
from experiments.harness.errors import UserError
from experiments.harness.invocation import as_arguments
from experiments.harness.reading import read_result
from experiments.harness.views import views_of
from experiments.scale.command import check_installed as check_ray
from tests.experiments.commands import run_instead
from tests.experiments.results import text_of
from tests.models.parity.golden import FOLDER, Golden

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
RUN = "python -m experiments "
LONG = (
    "cache --config",
    "cluster",
    "compile-report",
    "decode",
    "distill-prefix",
    "engine",
    "generate",
    "gradients",
    "grpo",
    "heads",
    "kernel --suite paper --memory-gb",
    "layers",
    "load",
    "minor",
    "quality",
    "report",
    "scale",
    "score",
    "search",
    "serve",
    "soak",
    "sparse",
    "tiers",
    "train-tiny",
)
"""These take long, most of them to compile, and have tests of their own that are shorter."""

THOROUGH = (
    "cache --config",
    "cluster",
    "compile-report",
    "decode --study batch",
    "decode --study completion",
    "distill-prefix",
    "generate --compare-batch",
    "generate --model ./Llama",
    "generate --system-prompt",
    "gradients",
    "grpo",
    "kernel --suite paper --memory-gb",
    "load --model",
    "quality --codec",
    "scale",
    "score",
    "search",
    "serve --model",
    "soak",
    "tiers",
    "train-tiny",
)
"""These run what another command runs, but for an option, or what tests of their own run as small:
here every day are their options and nothing more."""

OF_THE_USER = ("model", "trace", "system_prompt", "prompts", "text")
"""Options that name what is read: those typed win over the smoke form, but for the large model."""


def commands() -> list[str]:
    """What the README shows, in its blocks and in its lines, each once."""
    blocks = re.findall(r"```\w*\n(.*?)```", README, flags=re.DOTALL)
    lines = [part.strip() for block in blocks for part in re.split(r"\n|&&", block)]
    lines += re.findall(rf"`({RUN}[^`]+)`", README)
    return sorted({line.removeprefix(RUN) for line in lines if line.startswith(RUN)})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the files that the README names; what one command compiles, all find."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "prompt.txt").write_text("You answer briefly.")
    (folder / "questions.txt").write_text("Why?\nHow?\nWhen?\nWho?\n")
    (folder / "book.txt").write_text("It was a dark and stormy night. " * 300)
    trace = [
        f'{{"timestamp": {1000 * at}, "input_length": 1024, "output_length": 20, '
        f'"hash_ids": [{at % 3}, {at + 10}]}}\n'
        for at in range(500)
    ]
    (folder / "mooncake_conversation_trace.jsonl").write_text("".join(trace))
    (folder / "experiments").symlink_to(ROOT / "experiments")
    (folder / "tenants.toml").write_text("tenants = 50\nzipf = 1.2\n")
    Golden.read(FOLDER / "llama.npz").write_checkpoint(folder / "Llama-3.2-1B-Instruct")
    with compilation_cache(tmp_path_factory.mktemp("compiled")):
        yield folder


@pytest.fixture(autouse=True)
def _inside(
    workplace: Path, smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Commands run there; the hub has one model, and the one of PyPI is here already."""
    monkeypatch.chdir(workplace)
    kept = tmp_path / "cache" / "models"
    kept.mkdir(parents=True)
    os.symlink(smollm2_path, kept / smollm2_path.name)
    here = workplace / "Llama-3.2-1B-Instruct"
    monkeypatch.setattr(models.hub, "fetch_repository", lambda name: here)


def smoke(command: str) -> list[str]:
    """The command with its sizes replaced by those of its smoke form."""
    name, *typed = shlex.split(command)
    config = {**EXPERIMENTS, **COMMANDS}[name].config
    if not hasattr(config, "SMOKE"):
        return [name, *typed]
    given = {one.split("=")[0].removeprefix("--").replace("-", "_") for one in typed}
    sizes = {
        field: value
        for field, value in config.SMOKE.items()
        if field not in OF_THE_USER or field not in given or "smollm2" in typed
    }
    return [name, *typed, *as_arguments(config, sizes, "--smoke")]


def marks_of(command: str) -> list[pytest.MarkDecorator]:
    if not command.startswith(LONG):
        return []
    return [pytest.mark.slow, *([pytest.mark.thorough] if command.startswith(THOROUGH) else [])]


def test_every_experiment_is_shown():
    assert {command.split()[0] for command in commands()} == {*EXPERIMENTS, *COMMANDS}


@pytest.mark.parametrize("command", [pytest.param(one, marks=marks_of(one)) for one in commands()])
def test_a_command_runs(command: str, workplace: Path, capsys: pytest.CaptureFixture[str]):
    needs = {
        "compile-report": check_compiler,
        "scale": check_ray,
        "endpoint": check_server,
        "load": check_server,
    }.get(command.split()[0])
    if needs is not None:
        try:
            needs()
        except UserError as error:
            pytest.skip(str(error))
    if command == "report runs":
        assert main(["tree", "--smoke", "--fresh"]) == 0  # so that there is a run
    before = set(workplace.glob("runs/*"))
    assert main(smoke(command)) == 0, capsys.readouterr().err
    assert capsys.readouterr().out
    for folder in set(workplace.glob("runs/*")) - before:
        if (folder / "results.jsonl").exists():
            result = read_result(folder)
            assert result.summary is not None
            assert text_of(views_of(result.experiment).tables(result))


@pytest.mark.parametrize(
    "command", [one for one in commands() if one.startswith(THOROUGH) and "--sweep" not in one]
)
def test_the_options_of_a_command_are_taken(command: str, monkeypatch: pytest.MonkeyPatch):
    name, taken = command.split()[0], []
    run_instead(monkeypatch, name, lambda config: taken.append(config) or {})
    assert main(smoke(command)) == 0
    assert [type(config) for config in taken] == [EXPERIMENTS[name].config]


def test_what_is_installed_is_an_extra():
    extras = set(re.findall(r"pip install -e '\.\[([\w,-]+)\]'", README))
    assert extras
    known = metadata("jax-chunkattn").get_all("Provides-Extra") or []
    assert {one for extra in extras for one in extra.split(",")} <= set(known)
