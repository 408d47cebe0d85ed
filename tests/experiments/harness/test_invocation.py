"""Options from files, earlier results and `--smoke`; what is typed wins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments.cli import EXPERIMENTS, main
from experiments.generate.config import GenerateConfig
from experiments.harness.errors import UserError
from experiments.harness.invocation import as_arguments, expand, without_option
from experiments.harness.results import ResultFolder
from experiments.harness.sweep import SweepConfig
from tests.experiments.commands import run_instead
from tests.experiments.results import ENVIRONMENT


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GenerateConfig]:
    """Configs that `generate` is run with, which does nothing."""
    monkeypatch.chdir(tmp_path)
    configs: list[GenerateConfig] = []

    def run(config: GenerateConfig) -> dict[str, Any]:
        configs.append(config)
        return {}

    run_instead(monkeypatch, "generate", run)
    return configs


def test_options_come_from_a_file(ran: list[GenerateConfig], tmp_path: Path):
    (tmp_path / "options.toml").write_text(
        'model = "random:tiny"\nmax-tokens = 5\ncompare = false\ntemperature = 0.5\n'
    )
    assert main(["generate", "--config", "options.toml", "--max-tokens", "7"]) == 0
    [config] = ran
    assert (config.model, config.compare, config.temperature) == ("random:tiny", False, 0.5)
    assert config.max_tokens == 7  # typed
    assert config.chunk_size == 64  # nowhere


def test_a_result_can_be_repeated(ran: list[GenerateConfig], tmp_path: Path):
    earlier = GenerateConfig(model="random:tiny", batch=3, sharing=False, output=tmp_path / "a")
    with ResultFolder(tmp_path / "a", "generate", earlier) as folder:
        folder.begin(ENVIRONMENT)
        folder.finish_unit("this run", {"kind": "measured"})
    for named in ("a", "a/results.jsonl"):
        assert main(["generate", f"--from={named}", "--seed", "4"]) == 0
    for config in ran:
        assert (config.model, config.batch, config.sharing) == ("random:tiny", 3, False)
        assert (config.seed, config.output) == (4, None)  # it has a folder of its own
    assert main(["serve", "--from", "a"]) == 2


def test_a_sweep_cannot_be_repeated_as_one_run(ran: list[GenerateConfig], capsys: Any):
    with ResultFolder(Path("s"), "sweep", SweepConfig("generate", {}, {}, None)) as folder:
        folder.begin(ENVIRONMENT)
        folder.finish_unit("batch=2", {"kind": "point"})
    assert main(["generate", "--from", "s"]) == 2
    assert "--from s is a sweep: name the folder of one of its points" in capsys.readouterr().err


def test_smoke_counts_more_than_an_earlier_result(ran: list[GenerateConfig]):
    with ResultFolder(Path("a"), "generate", GenerateConfig(batch=9, top_k=3)) as folder:
        folder.begin(ENVIRONMENT)
        folder.finish_unit("this run", {"kind": "measured"})
    assert main(["generate", "--smoke", "--from", "a"]) == 0
    [config] = ran
    assert (config.batch, config.top_k) == (GenerateConfig.SMOKE["batch"], 3)


def test_files_are_read_in_their_order(ran: list[GenerateConfig]):
    Path("a.toml").write_text("batch = 2\nseed = 1")
    Path("b.toml").write_text("batch = 3")
    assert main(["generate", "--config", "a.toml", "--config=b.toml"]) == 0
    [config] = ran
    assert (config.batch, config.seed) == (3, 1)


def test_smoke_and_files_have_an_order(ran: list[GenerateConfig], tmp_path: Path):
    (tmp_path / "options.toml").write_text("batch = 2")
    assert main(["generate", "--smoke", "--config", "options.toml", "--compare-batch", "1"]) == 0
    [config] = ran
    assert config.model == GenerateConfig.SMOKE["model"]
    assert (config.batch, config.compare_batch) == (2, 1)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_smoke_stands_for_is_accepted(name: str):
    experiment = EXPERIMENTS[name]
    assert len(expand(experiment.config, name, ["--smoke"])) > 1
    experiment.check(experiment.config(**experiment.config.SMOKE))


def test_fresh_begins_in_a_folder_of_its_own(ran: list[GenerateConfig]):
    assert main(["generate", "--fresh"]) == 0
    assert main(["generate", "--fresh", "--output", "here"]) == 0
    first, second = ran
    assert first.output is not None
    assert first.output.name.startswith("generate-")
    assert second.output == Path("here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "absent.toml"], "--config absent.toml cannot be read (No such file"),
        (["--config", "broken.toml"], "--config broken.toml is not TOML"),
        (["--config", "unknown.toml"], "unknown.toml: unknown option 'wdith'; known: batch, "),
        (
            ["--config", "nested.toml"],
            "batch must be a text, a number, true, false or a list, got",
        ),
        (["--config", "output.toml"], "output.toml: output is of one run; type --output"),
        (["--from", "absent"], "absent holds no result"),
    ],
)
def test_bad_files_are_told_in_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("batch = = 3")
    Path("unknown.toml").write_text("wdith = 3")
    Path("nested.toml").write_text("[batch]\nx = 1")
    Path("output.toml").write_text('output = "x"')
    assert main(["generate", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_value_of_the_wrong_type_exits_with_2(tmp_path: Path, capsys: Any):
    (tmp_path / "options.toml").write_text('batch = "many"')
    with pytest.raises(SystemExit) as exit_info:
        main(["generate", "--config", str(tmp_path / "options.toml")])
    assert exit_info.value.code == 2
    assert "many" in capsys.readouterr().err


def test_an_option_is_taken_out_with_its_value():
    given = ["--sweep", "a=1", "--x", "--sweep=b=2", "--sweeping", "y"]
    assert without_option("--sweep", given) == ["--x", "--sweeping", "y"]


def test_an_unknown_field_is_an_error_of_its_source():
    with pytest.raises(UserError, match="it: unknown option 'colour'"):
        as_arguments(GenerateConfig, {"colour": "red"}, "it")
