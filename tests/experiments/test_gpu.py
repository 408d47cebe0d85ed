"""`python -m experiments gpu`, rehearsed on a CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from experiments.cli import main
from experiments.gpu import floors, grid, oracle
from experiments.gpu.command import default_folder, headline
from experiments.gpu.config import RESULTS, GpuConfig, Part
from experiments.gpu.jobs import XLA, Job, OwnSide, unshared
from experiments.gpu.views import tables
from experiments.harness.reading import read_result
from pallas_kernels.specs import AttentionCase
from tests.experiments.results import summary_in, text_of

PARTS = tuple(part for part in get_args(Part) if part != "tune")
CASES = [
    AttentionCase("1,3_32,8", 2, 2, 16, chunk_size=16),
    AttentionCase("2_40", 2, 1, 16, chunk_size=16),
]


@pytest.fixture
def small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part `paper` times XLA alone, which needs no interpreter."""
    jobs = [Job(case, (OwnSide(XLA), unshared(XLA))) for case in CASES]
    monkeypatch.setitem(grid.JOBS, "paper", lambda: jobs)
    monkeypatch.setattr(grid, "rehearsed", lambda jobs: jobs)


def rehearse(folder: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], dict[str, Any]]:
    """Exit code, records and summary of a dry run."""
    code = main(["gpu", "--dry-run", "--output", str(folder), *arguments])
    result = read_result(folder)
    return code, result.of_kind("record"), summary_in(folder)


@pytest.mark.slow
@pytest.mark.thorough
def test_every_part_rehearses_in_one_go(tmp_path: Path):
    code, records, summary = rehearse(tmp_path / "out")
    assert code == 0
    assert summary["parts"] == list(PARTS)
    assert list(summary["counts"]) == list(PARTS)
    assert headline(summary) == {"failures": 0, "records": len(records)}
    assert summary["failures"] == summary["errors"] == []
    assert summary["goals"] == []  # nothing is claimed of a rehearsal
    assert all(record["dry_run"] is True for record in records)

    measured = [record for record in records if record["status"] == "measured"]
    assert all({"part", "case", "side", "value", "unit"} <= record.keys() for record in measured)
    skipped = [record for record in records if record["status"] == "skipped"]
    assert all(record["message"] for record in skipped)
    assert all("Mosaic" in r["message"] for r in skipped if r["side"] == "pallas_mosaic_gpu")

    checks = [record for record in measured if record["part"] == "correctness"]
    plans = {record["side"].removeprefix("pallas_triton ") for record in checks}
    assert plans == {"cost", "fasttree", "pat", "unshared", "all shared", "prefill"}
    assert all(record["passed"] and record["steady"] for record in checks)
    assert [r["value"] for r in measured if r["part"] == "tokens"] == [1.0]
    for part in ("paper", "trees", "hydragen"):
        timed = [record for record in measured if record["part"] == part]
        assert timed
        assert all(0 < record["least"] <= record["value"] for record in timed)
    text = text_of(tables(read_result(tmp_path / "out")))
    assert all(f"**{part}**" in text for part in PARTS)


def test_what_there_is_no_time_for_is_said(tmp_path: Path):
    code, records, summary = rehearse(tmp_path / "out", "--minutes", "0.001")
    assert code == 0
    assert {record["part"] for record in records if record["status"] == "measured"} <= {"target"}
    for part in PARTS[1:]:
        (record,) = (record for record in records if record["part"] == part)
        assert "no time" in record["message"]
        assert "--minutes" in record["message"]
    assert len(summary["skipped"]) >= len(PARTS) - 1


def test_cases_beyond_a_parts_time_are_skipped(
    tmp_path: Path, small_jobs: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(grid, "_JOBS_AT_ONCE", 1)
    left = iter([None, "no time: enough"])
    monkeypatch.setattr("experiments.gpu.budget.Budget.lacks", lambda *_: next(left, None))
    monkeypatch.setattr(floors, "ensure", lambda bench: bench.facts.update(copy=1e9, matmul=1e9))
    # The part itself and its first case are let through, its second case is not.
    left = iter([None, None, "no time: enough"])
    _, records, _ = rehearse(tmp_path / "out", "--part", "paper")
    statuses = [(record["case"], record["status"]) for record in records]
    assert statuses == [(CASES[0].name, "measured")] * 2 + [(CASES[1].name, "skipped")]


def test_a_failing_case_loses_nothing_else(
    tmp_path: Path, small_jobs: None, monkeypatch: pytest.MonkeyPatch
):
    real = grid.loop_side

    fire = iter([RuntimeError("the device is on fire")])

    def fails_once(*arguments):
        for error in fire:
            raise error
        return real(*arguments)

    monkeypatch.setattr(grid, "loop_side", fails_once)
    code, records, summary = rehearse(tmp_path / "out", "--part", "floors", "paper")
    assert code == 0  # a time that is missing is no wrong result
    paper = [record for record in records if record["part"] == "paper"]
    assert [record["status"] for record in paper].count("measured") == 3
    (error,) = (record for record in paper if record["status"] == "error")
    assert (error["case"], error["side"]) == (CASES[0].name, XLA)
    assert "on fire" in error["message"]
    assert len(summary["errors"]) == 1


def test_a_broken_part_ends_with_an_error_and_loses_nothing_else(
    tmp_path: Path,
    small_jobs: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def breaks(bench):
        raise RuntimeError("broken")

    monkeypatch.setattr("experiments.gpu.device.run", breaks)
    code, records, summary = rehearse(tmp_path / "out", "--part", "target", "paper")
    assert code == 1
    assert "1 failures, the first: target all all: RuntimeError: broken" in capsys.readouterr().err
    assert [record["status"] for record in records if record["part"] == "paper"] == ["measured"] * 4
    assert len(summary["failures"]) == 1


def test_a_wrong_result_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("experiments.gpu.correctness.cases", lambda small: CASES[:1])
    monkeypatch.setattr("experiments.gpu.prefill_cases.cases", lambda small: ())
    monkeypatch.setattr("experiments.gpu.coded_cases.cases", lambda small: ())
    monkeypatch.setattr("experiments.gpu.windowed_cases.cases", lambda small: ())
    monkeypatch.setattr("experiments.gpu.choice_cases.cases", lambda small: ())
    monkeypatch.setattr("experiments.gpu.clustered_cases.cases", lambda small: ())
    monkeypatch.setattr(oracle, "TOLERANCE", 0.0)
    monkeypatch.setattr(oracle, "LEAST_ERROR", -1.0)
    code, records, summary = rehearse(tmp_path / "out", "--part", "correctness")
    assert code == 1
    assert [r["passed"] for r in records if r["status"] == "measured"] == [False] * 5
    assert len(summary["failures"]) == 5


WITHOUT_FLAX = """
import sys
sys.modules["flax"] = None
from experiments.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_only_what_runs_a_model_needs_flax(tmp_path: Path):
    output = tmp_path / "out"
    parts = ["--part", "floors", "tokens", "decode"]
    arguments = ["gpu", "--dry-run", *parts, "--output", str(output)]
    subprocess.run([sys.executable, "-c", WITHOUT_FLAX, *arguments], check=True)
    records = read_result(output).of_kind("record")
    assert {r["status"] for r in records if r["part"] == "floors"} == {"measured"}
    for part in ("tokens", "decode"):
        assert ["flax" in r["message"] for r in records if r["part"] == part] == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part"], "--part names nothing to do"),
        (["--part", "floors", "floors"], "--part names one twice: floors floors"),
        (["--minutes", "0"], "--minutes must be a number above 0, got 0"),
        (["--minutes", "nan"], "--minutes must be a number above 0, got nan"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--dry-run", "--compile-only"], "--dry-run and --compile-only exclude each other"),
        (["--dry-run", "--output", str(RESULTS / "x")], "--output: "),
        ([], "there is no NVIDIA GPU here"),
    ],
)
def test_bad_values_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    assert main(["gpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.json*"))


@pytest.mark.parametrize("arguments", [["--part", "magic"], ["--minutes", "many"]])
def test_unknown_names_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["gpu", *arguments])
    assert exit_info.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


def test_results_of_a_device_have_a_folder_by_its_name(monkeypatch: pytest.MonkeyPatch):
    class Device:
        platform, device_kind = "gpu", "NVIDIA H200"

    monkeypatch.setattr("jax.devices", lambda: [Device()])
    path = default_folder(GpuConfig())
    assert path.parent.parent == Path(__file__).parents[2] / "experiments" / "results"
    assert path.parent.name.startswith("h200-20")
    assert default_folder(GpuConfig(dry_run=True)).parent == Path("runs")
