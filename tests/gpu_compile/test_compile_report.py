"""The command: its checks before anything is compiled, its tables, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.cli import main
from experiments.compile_report import run as compile_report_run
from experiments.compile_report import target
from experiments.compile_report.config import Gpu
from experiments.compile_report.views import failures_of, tables
from tests.experiments.results import lines_in, make_result, text_of

KERNEL = {
    "name": "chunk_first",
    "backend": "triton",
    "registers": 192,
    "spill_stores": 0,
    "spill_loads": 0,
    "shared": 81924,
    "threads": 128,
    "occupancy": 2,
}
RECORD = {
    "kernels": [KERNEL],
    "pallas_launches": 1,
    "captured_pallas_launches": 1,
    "command_buffers": 1,
    "collectives": {},
    "temporary_bytes": 1 << 20,
    "aliased_bytes": 1 << 30,
    "compile_seconds": 1.5,
}
GOOD = {"name": "good", **RECORD, "pool_copies": []}
CODED = {"name": "coded", **RECORD, "kernels": [KERNEL | {"instructions": 3844}]}
CODED["chunk_bytes"] = 9280
SPILLING = {"name": "tight", **RECORD, "kernels": [KERNEL | {"spill_stores": 64}]}
COPYING = {"name": "loop", **RECORD, "pool_copies": ["copy bf16[2,8,64] in main"]}
BROKEN = {"name": "odd", "error": "the compiler stopped: abort"}


def test_failures():
    assert failures_of([SPILLING, GOOD, COPYING, BROKEN]) == [
        "loop: copies the pool (copy bf16[2,8,64] in main)",
        "odd: the compiler stopped: abort",
        "tight: chunk_first spills registers",
    ]


def test_tables_show_every_case():
    kernels = [{"kind": "kernel", **one} for one in (GOOD, SPILLING, BROKEN, CODED)]
    programs = [{"kind": "program", **one} for one in (GOOD, COPYING)]
    result = make_result("compile-report", [*kernels, *programs], {"device_kind": "H200"})
    printed = text_of(tables(result))
    for part in (
        "192",
        "64 B",
        "80.0",
        "3844",
        "9.1 KiB",
        "does not compile",
        "1 of 1",
        "YES",
        "1.00 GiB",
    ):
        assert part in printed
    assert printed.count("compiled for H200") == 2
    backwards = make_result("compile-report", [*kernels, *programs][::-1], {"device_kind": "H200"})
    assert text_of(tables(backwards)) == printed


def run(
    records: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and result lines of a run whose compiler returns `records`."""

    def compile_cases(table, names, *_, on_record, **__):
        for record in records:
            on_record(record)
        return records

    monkeypatch.setattr(compile_report_run, "compile_cases", compile_cases)
    monkeypatch.setattr(target, "check_installed", lambda: None)
    code = main(["compile-report", "--variants", "none", "--json", "--output", str(folder)])
    return code, lines_in(folder)[1:]


def test_a_clean_run_exits_with_0(tmp_path, monkeypatch, capsys):
    code, lines = run([GOOD], tmp_path / "out", monkeypatch)
    assert code == 0
    assert lines == [{"kind": "program", "unit": "good", "gpu": "h200", **GOOD}]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failures"] == []


def test_a_failure_exits_with_1_and_keeps_the_results(tmp_path, monkeypatch, capsys):
    code, lines = run([GOOD, COPYING], tmp_path / "out", monkeypatch)
    assert code == 1
    assert len(lines) == 2
    assert "failed: loop: copies the pool" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failures"]


def test_a_missing_compiler_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(target, "_has_module", lambda name: False)
    monkeypatch.setattr(target, "find_ptxas", lambda: None)
    assert main(["compile-report"]) == 2
    error = capsys.readouterr().err
    assert "JAX's CUDA plugin and ptxas and absl-py" in error
    assert "pip install 'jax_chunkattn[gpu-check]'" in error
    assert not list(tmp_path.iterdir())


def test_no_processes_is_refused(capsys):
    assert main(["compile-report", "--processes", "0"]) == 2
    assert "--processes must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "none"], "--variants none and --no-programs leave nothing to compile"),
        (["--backends"], "--backends names nothing to compile"),
        (
            ["--gpu", "a100", "--backends", "pallas_mosaic_gpu"],
            "--gpu a100 does not run pallas_mosaic_gpu of --backends, only pallas_triton",
        ),
    ],
)
def test_a_report_on_nothing_is_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compile-report", "--no-programs", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_in_the_options_are_known_targets():
    assert set(Gpu.__args__) == set(target.TARGETS)
