"""`--sweep`: every combination once, in a folder of its own, going on where it was broken off."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cli import EXPERIMENTS, main
from experiments.generate.config import GenerateConfig
from experiments.harness import environment, sweep
from experiments.harness.errors import CheckFailed
from experiments.harness.reading import read_result
from experiments.harness.results import ResultFolder
from experiments.harness.sweep_views import figures, tables
from tests.experiments.commands import run_instead
from tests.experiments.results import ENVIRONMENT, make_result, summary_in

HOST = ENVIRONMENT

SWEEP = ["generate", "--sweep", "batch=2,4,8", "--sweep", "dtype=float32,bfloat16", "--output", "s"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[GenerateConfig]:
    """Configs that `generate` is run with, which leaves a result at once."""
    configs: list[GenerateConfig] = []

    def run(config: GenerateConfig) -> dict[str, Any]:
        configs.append(config)
        rate = 10.0 * (config.batch or 0)
        assert config.output is not None
        with ResultFolder(config.output, "generate", config) as folder:
            folder.begin(ENVIRONMENT)
            if config.batch == 8 and len(configs) < 7:
                raise KeyboardInterrupt
            folder.finish_unit("this run", {"kind": "measured"})
            summary = {
                "decode_tokens_per_second": rate,
                "kv_bytes_held": 1,
                "kv_bytes_unshared": 2,
                "compare": None,
            }
            folder.write_summary(summary)
        return summary

    monkeypatch.chdir(tmp_path)
    run_instead(monkeypatch, "generate", run)
    return configs


def test_a_sweep_goes_on_where_it_was_broken_off(
    ran: list[GenerateConfig], capsys: pytest.CaptureFixture[str]
):
    assert main(SWEEP) == 130
    assert "the results so far (4 lines) are in s/results.jsonl" in capsys.readouterr().err
    assert [(one.batch, one.dtype) for one in ran] == [
        (2, "float32"),
        (2, "bfloat16"),
        (4, "float32"),
        (4, "bfloat16"),
        (8, "float32"),
    ]
    ran += [GenerateConfig()] * 3
    assert main(SWEEP) == 0
    assert [(one.batch, one.dtype) for one in ran[8:]] == [(8, "float32"), (8, "bfloat16")]
    points = summary_in(Path("s"))["points"]
    assert [point["headline"]["decode tokens/s"] for point in points] == [20, 20, 40, 40, 80, 80]
    assert read_result(Path("s/batch=4,dtype=bfloat16")).config["dtype"] == "bfloat16"
    assert "generate over batch, dtype" in capsys.readouterr().out


def test_a_point_that_ended_before_its_line_was_written_is_kept(ran: list[GenerateConfig]):
    command = ["generate", "--sweep", "batch=2,4", "--output", "s"]
    assert main(command) == 0
    header, first, _ = Path("s/results.jsonl").read_text().splitlines()
    Path("s/results.jsonl").write_text(f"{header}\n{first}\n")
    Path("s/summary.json").unlink()
    assert main(command) == 0
    assert len(ran) == 2
    assert len(summary_in(Path("s"))["points"]) == 2


def test_a_sweep_is_drawn_over_the_option_that_is_a_number(ran: list[GenerateConfig]):
    assert (
        main(["generate", "--sweep", "dtype=float32,float16", "--sweep=batch=4,2", "--json"]) == 0
    )
    [folder] = Path("runs").iterdir()
    result = read_result(folder)
    [table] = tables(result)
    assert [row[:3] for row in table.rows] == [
        ("float32", "4", "40"),
        ("float32", "2", "20"),
        ("float16", "4", "40"),
        ("float16", "2", "20"),
    ]
    rate, *_ = figures(result)["picture"].axes
    assert (rate.get_xlabel(), rate.get_title()) == ("batch", "")
    lines = {line.get_label(): line for line in rate.get_lines()}
    assert set(lines) == {"dtype=float32", "dtype=float16"}
    drawn = np.asarray(lines["dtype=float16"].get_xydata())
    assert drawn.tolist() == [[2, 20], [4, 40]]


def test_headlines_that_are_not_finite_are_not_drawn():
    points = [
        {"kind": "point", "fields": {"batch": text}, "headline": {"a": a, "b": b}, "unit": text}
        for text, a, b in (("1", 2.0, 1.0), ("2", math.inf, 2.0), ("3", 4.0, 3.0))
    ]
    config = {"of": "generate", "fields": {"batch": ["1", "2", "3"]}}
    result = make_result("sweep", points, {}, config)
    assert [axes.get_ylabel() for axes in figures(result)["picture"].axes] == ["b"]
    assert [row[1] for row in tables(result)[0].rows] == ["2", "inf", "4"]


def test_a_sweep_broken_off_in_its_first_point_goes_on_there(
    ran: list[GenerateConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    finished: list[set[str]] = []

    def run(config: GenerateConfig) -> dict[str, Any]:
        assert config.output is not None
        with ResultFolder(config.output, "generate", config) as folder:
            finished.append(set(folder.finished))
            folder.begin(ENVIRONMENT)
            folder.finish_unit("this run", {"kind": "measured"})
            raise KeyboardInterrupt

    run_instead(monkeypatch, "generate", run)
    monkeypatch.setattr(environment, "describe_host", lambda: HOST)
    monkeypatch.setattr(sweep, "describe_environment", lambda: {**ENVIRONMENT, **HOST})
    command = ["generate", "--sweep", "batch=2,4"]
    for _ in range(2):
        assert main(command) == 130
        assert "lines) are in runs/sweep-" in capsys.readouterr().err
    assert finished == [set(), {"this run"}]
    assert len(list(Path("runs").iterdir())) == 1


def test_a_failed_check_is_remembered(
    ran: list[GenerateConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run = EXPERIMENTS["generate"].run

    def run_and_check(config: GenerateConfig) -> dict[str, Any]:
        summary = run(config)
        if config.batch == 2:
            raise CheckFailed("answers differ", summary)
        return summary

    run_instead(monkeypatch, "generate", run_and_check)
    command = ["generate", "--sweep", "batch=2,4", "--output", "s"]
    assert main(command) == 1
    assert "failed: batch=2: answers differ" in capsys.readouterr().err
    assert len(ran) == 2
    Path("s/summary.json").unlink()
    assert main(command) == 1
    assert len(ran) == 2
    assert "FAILED: batch=2: answers differ" in capsys.readouterr().out


def test_switches_and_paths_can_be_swept(ran: list[GenerateConfig]):
    Path("a").mkdir()
    for name in ("a/b.txt", "a_b.txt"):
        Path(name).write_text("Why?\n")
    command = ["generate", "--sweep", "sharing=true,False", "--sweep", "prompts=a/b.txt,a_b.txt"]
    assert main([*command, "--output", "s"]) == 0
    assert [(one.sharing, str(one.prompts)) for one in ran] == [
        (True, "a/b.txt"),
        (True, "a_b.txt"),
        (False, "a/b.txt"),
        (False, "a_b.txt"),
    ]
    assert len(list(Path("s").glob("*/results.jsonl"))) == 4


def test_points_may_have_headlines_of_their_own_and_below_zero():
    lines = [
        {"kind": "point", "fields": {"width": "2"}, "headline": {"score": -3.0, "left": 1.0}},
        {"kind": "point", "fields": {"width": "3"}, "headline": {"score": -1.0, "right": 2.0}},
    ]
    result = make_result("sweep", lines, {}, {"of": "search", "fields": {"width": ["2", "3"]}})
    [table] = tables(result)
    assert [column.heading for column in table.columns] == ["width", "score", "left", "right"]
    [axes] = figures(result)["picture"].axes
    assert axes.get_ylim()[0] < -3 < -1 < axes.get_ylim()[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sweep", "colour=1,2"], "--sweep colour=1,2: unknown option 'colour'; known: batch"),
        (["--sweep", "batch"], "--sweep batch: expected OPTION=A,B,C with values that differ"),
        (["--sweep", "batch=2,2"], "expected OPTION=A,B,C with values that differ"),
        (["--sweep", "batch=2", "--sweep", "batch=3"], "--sweep names --batch twice"),
        (["--sweep", "batch=2,0"], "--batch must be at least 1, got 0"),
        (["--sweep", "output=a,b"], "unknown option 'output'"),
        (["--sweep", "prompts=a," + "b" * 250], "--sweep: a folder cannot be named prompts=bbb"),
        (["--sweep", "sharing=yes"], "--sweep sharing=yes: expected true or false"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_runs(
    ran: list[GenerateConfig], given: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["generate", *given]) == 2
    assert message in capsys.readouterr().err
    assert ran == []
    assert not Path("runs").exists()


def test_the_summary_is_one_line_of_json(ran: list[GenerateConfig], capsys: Any):
    assert main(["generate", "--sweep", "max-tokens=3,5", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["of"], summary["fields"]) == ("generate", {"max_tokens": ["3", "5"]})
