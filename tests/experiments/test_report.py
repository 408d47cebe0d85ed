"""`python -m experiments report`: the page of made-up results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.cli import main
from experiments.engine.config import EngineConfig
from experiments.harness.results import ResultFolder
from tests.experiments.results import ENVIRONMENT


def write_result(path: Path, *, ended: bool = True) -> None:
    """A run of `engine` with two rounds."""
    side = {"tokens": 64, "seconds": 0.5, "host_seconds": 0.01, "rate": 128.0}
    with ResultFolder(path, "engine", EngineConfig()) as folder:
        folder.begin(ENVIRONMENT)
        for number in (1, 2):
            record = {"kind": "round", "round": number, "bare loop": side, "engine": side}
            folder.finish_unit(f"round {number}", record)
        if ended:
            folder.write_summary(
                {
                    **{"rows": 4, "model": "m|x", "shared_tokens": 64, "steps_per_call": 8},
                    **{"rounds": 2, "bare_tokens_per_second": 128.0, "ratio": 0.5},
                    **{"engine_tokens_per_second": 64.0, "ratio_range": [0.4, 0.6]},
                    "host_microseconds_per_token": 12.5,
                }
            )


def test_a_page_has_tables_pictures_and_where_they_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    write_result(Path("runs/one/engine"))
    write_result(Path("runs/two/engine"))
    write_result(Path("runs/three"), ended=False)
    with ResultFolder(Path("runs/foreign"), "juggling", EngineConfig()) as folder:
        folder.begin(ENVIRONMENT)
        folder.finish_unit("one", {"kind": "ball"})
    Path("runs/old").mkdir()
    Path("runs/old/results.jsonl").write_text('{"kind": "case"}\n')
    assert main(["report", "runs", "--output", "page", "--title", "Mine"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "page: page/report.md\n"
    foreign, old = captured.err.splitlines()
    assert foreign == "left out: runs/foreign is of 'juggling', which is no experiment here"
    assert old.startswith("left out: runs/old/results.jsonl does not begin with a header")
    text = Path("page/report.md").read_text()
    assert text.startswith("# Mine\n")
    for part in (
        "## one-engine\n",
        "## two-engine\n",
        "`python -m experiments x`",
        "cpu, 2 CPUs, Linux, Python 3.11.0, jax 1.2.3; commit abc",
        "| engine | 64.0 | 12.5 us a token |",
        "[![one-engine-picture](one-engine-picture.png)](one-engine-picture.svg)",
        "Broken off after 2 units",
    ):
        assert part in text
    for name in ("one-engine-picture.png", "two-engine-picture.svg"):
        assert (Path("page") / name).stat().st_size > 1000

    again = Path("runs/one/engine/results.jsonl").resolve()
    assert main(["report", "runs/one", "runs/one/engine", str(again), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["results"] == ["runs/one/engine"]
    assert Path(summary["page"]).is_file()


def test_the_points_of_a_sweep_are_in_its_own_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from experiments.report.page import find_results

    monkeypatch.chdir(tmp_path)
    write_result(Path("runs/sweep"))
    write_result(Path("runs/sweep/rows=4"))
    assert find_results([Path("runs")]) == [Path("runs/sweep")]
    assert find_results([Path("runs/sweep/rows=4")]) == [Path("runs/sweep/rows=4")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "name a result folder"),
        (["absent"], "absent is no folder"),
        (["empty"], "empty holds no results: no results.jsonl in it, nor below it"),
    ],
)
def test_what_holds_no_results_is_named(
    given: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["report", *given]) == 2
    assert capsys.readouterr().err == f"error: {message}\n" or not given
