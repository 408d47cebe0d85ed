"""`python -m experiments kernel`, small."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from experiments import kernel_run, kernel_sides
from experiments.cli import main
from experiments.harness import timing
from experiments.harness.errors import UserError
from experiments.kernel import Implementation, KernelConfig, Suite, run
from pallas_kernels.chunk_attention import IMPLEMENTATIONS
from pallas_kernels.specs import PAPER, AttentionCase
from pallas_kernels.targets import A100, use_target

SHARED = AttentionCase("1,6_256,16", 4, 2, 16, chunk_size=16, ragged=20)
UNSHARED = AttentionCase("3_40", 2, 2, 16, chunk_size=16)
NAMED = get_args(Implementation)
ALL = NAMED[2:]  # without those that need a GPU


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(kernel_run, "SUITES", {"smoke": (SHARED, UNSHARED), "paper": (SHARED,)})


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "out"
    assert main(["kernel", "--repeats", "2", "--seed", "3", "--output", str(output)]) == 0
    table = capsys.readouterr().out.splitlines()

    summary = json.loads((output / "summary.json").read_text())
    lines = (output / "results.jsonl").read_text().splitlines()[1:]
    assert [json.loads(line) for line in lines] == [
        {"kind": "case", **record} for record in summary["cases"]
    ]
    assert (summary["experiment"], summary["suite"], summary["seed"]) == ("kernel", "smoke", 3)
    assert summary["environment"]["platform"] == "cpu"
    for record, case in zip(summary["cases"], (SHARED, UNSHARED), strict=True):
        check_record(record, case)
    assert summary["cases"][0]["plan"]["shared"]
    assert not summary["cases"][1]["plan"]["shared"]

    text = "\n".join(table)
    for words in (SHARED.name, UNSHARED.name, *ALL, "matrix product", "x matmul", "max error"):
        assert words in text
    assert summary["cases"][0]["plan"]["reason"] in text


def check_record(record: dict[str, Any], case: AttentionCase) -> None:
    """Every number is there and the derived ones follow from the measured ones."""
    assert (record["case"], record["tree"]) == (case.name, case.tree)
    assert record["skipped"] == []
    assert record["flops"] == 4 * case.num_heads * case.head_dim * record["tokens_attended"]
    assert record["distinct_kv_bytes"] <= record["unshared_kv_bytes"]
    assert record["memory_read"]["gb_per_second"] > 0
    product = record["matmul"]["same_flops_milliseconds"]
    sides = {side["implementation"]: side for side in record["implementations"]}
    assert list(sides) == list(ALL)
    paged = sides["paged"]["milliseconds"]["median"]
    for side in sides.values():
        times = side["milliseconds"]
        assert 0 < times["least"] <= times["median"] <= times["most"]
        assert side["times_matmul"] == pytest.approx(times["median"] / product, rel=2e-3)
        assert side["speedup_over_paged"] == pytest.approx(paged / times["median"], rel=2e-3)
        assert 0 < side["max_error"] < 2e-6


def test_tokens_that_rows_share_are_counted_once():
    record = kernel_run.measure_case(SHARED, KernelConfig(implementations=("xla",), repeats=1))
    own = record["tokens_attended"] - 6 * 256
    bytes_per_token = 2 * 2 * 16 * 4
    assert record["distinct_kv_bytes"] == (256 + own) * bytes_per_token
    assert record["unshared_kv_bytes"] == (6 * 256 + own) * bytes_per_token
    assert record["implementations"][0]["speedup_over_paged"] is None


def test_a_wrong_output_shows_in_the_error(monkeypatch: pytest.MonkeyPatch):
    real = kernel_sides.dense_attention
    monkeypatch.setattr(kernel_sides, "dense_attention", lambda *args: real(*args) + 0.25)
    record = kernel_run.measure_case(UNSHARED, KernelConfig(implementations=("dense",), repeats=1))
    assert record["implementations"][0]["max_error"] == pytest.approx(0.25, abs=1e-5)


def test_what_does_not_fit_is_skipped_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernel_sides, "REFERENCE_SCORES", 100)
    pool, copies = kernel_sides.pool_bytes(SHARED), kernel_sides.copies_bytes(SHARED)
    config = KernelConfig("paper", ALL, 1, (pool + copies) / 1e9, output=tmp_path / "out")
    (record,) = run(config)["cases"]
    skipped = {skip["implementation"]: skip["reason"] for skip in record["skipped"]}
    assert list(skipped) == ["dense", "reference"]
    assert [side["implementation"] for side in record["implementations"]] == list(ALL[:4])
    printed = " ".join(capsys.readouterr().out.split())
    assert "skipped dense: its copies take" in printed
    assert "skipped reference: it would score every query" in printed


def test_kernels_without_a_gpu_are_skipped_and_said():
    config = KernelConfig(implementations=("pallas_triton", "xla"), repeats=1)
    record = kernel_run.measure_case(SHARED, config)
    assert [side["implementation"] for side in record["implementations"]] == ["xla"]
    (skip,) = record["skipped"]
    assert skip["implementation"] == "pallas_triton"
    assert "needs an NVIDIA GPU, and the device is 'cpu'" in skip["reason"]


def test_baselines_skip_scores_that_they_do_not_know():
    case = dataclasses.replace(SHARED, softcap=3.0, scale=1.0)
    config = KernelConfig(implementations=("xla", "paged", "dense"), repeats=1)
    record = kernel_run.measure_case(case, config)
    (side,) = record["implementations"]
    assert 0 < side["max_error"] < 2e-6
    reasons = {skip["implementation"]: skip["reason"] for skip in record["skipped"]}
    assert reasons == dict.fromkeys(
        ("paged", "dense"), "it knows neither a softcap nor a scale of its own"
    )


def test_gpu_kernels_are_planned_for_and_checked():
    target = dataclasses.replace(A100, interpret=True)
    with use_target(target):
        assert kernel_sides.runnable_implementations() == NAMED
        config = KernelConfig(implementations=("pallas_triton",), repeats=1)
        (side,) = kernel_run.measure_case(SHARED, config)["implementations"]
    assert 0 < side["max_error"] < 2e-6


def test_a_pool_that_does_not_fit_skips_the_case(tmp_path: Path):
    (record,) = run(KernelConfig("paper", ALL, 1, 1e-9, output=tmp_path / "out"))["cases"]
    assert record["implementations"] == []
    assert record["plan"] is None
    assert [skip["implementation"] for skip in record["skipped"]] == list(ALL)
    assert "above --memory-gb" in record["skipped"][0]["reason"]


def test_bytes_are_those_of_the_operands():
    operands = kernel_sides.make_operands(SHARED, seed=0)
    num_chunks = operands.keys.shape[2]
    used = (num_chunks - 3) / num_chunks  # three are to spare
    assert used * 2 * operands.keys.nbytes <= kernel_sides.pool_bytes(SHARED)
    copies = kernel_sides.dense_copies(operands.keys, operands.tables)
    assert 2 * copies.nbytes <= kernel_sides.copies_bytes(SHARED)


@pytest.mark.parametrize(
    "arguments", [["--suite", "huge"], ["--implementations", "magic"], ["--repeats", "many"]]
)
def test_unknown_names_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["kernel", *arguments])
    assert exit_info.value.code == 2
    assert arguments[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--memory-gb", "nan"], "--memory-gb must be a number above 0, got nan"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--implementations", "xla", "xla"], "--implementations names one twice: xla xla"),
        (["--implementations"], "--implementations names nothing"),
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
    assert main(["kernel", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"suite": "huge"}, {"implementations": ("magic",)}])
def test_unknown_names_from_python_are_refused(wrong: dict[str, Any], tmp_path: Path):
    with pytest.raises(
        UserError, match=r"unknown '(huge|magic)'; known: (smoke|pallas_mosaic_gpu)"
    ):
        run(KernelConfig(**wrong, output=tmp_path / "out"))


def test_every_implementation_can_be_named():
    assert set(NAMED) >= set(IMPLEMENTATIONS)
    assert set(NAMED) == set(kernel_sides._SIDES)
    assert set(get_args(Suite)) == set(kernel_run.SUITES)


def test_the_paper_suite_is_the_grid_of_table_3():
    assert len(PAPER) == 9
    for case in PAPER:
        assert (case.batch, case.num_heads, case.num_kv_heads) == (32, 32, 32)
        assert (case.head_dim, case.chunk_size, case.dtype) == (128, 64, "float32")
    assert PAPER[-1].tree == "1,32_4096,64"


def test_calls_are_timed_in_turns():
    made: list[str] = []
    calls = {name: lambda name=name: made.append(name) or np.zeros(1) for name in ("a", "b")}
    timings, outputs = timing.time_in_turns(calls, 5)
    assert set(outputs) == {"a", "b"}
    assert made[:2] == ["a", "b"]
    for turn in range(1, 6):
        assert set(made[2 * turn : 2 * turn + 2]) == {"a", "b"}
    assert timings["a"].least <= timings["a"].median <= timings["a"].most


def test_importing_the_config_imports_nothing_heavy():
    code = "import sys, experiments.kernel; sys.exit(bool({'jax','numpy','rich'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
