"""Kernels over encoded chunks, compiled for an H200: they decode without spilling registers."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.compile_report.target import TARGETS, check_installed
from experiments.compile_report.views import failures_of
from experiments.compile_report.worker import compile_cases
from experiments.harness.errors import UserError
from tests.gpu_compile.coded_cases import VARIANTS


@pytest.mark.slow
def test_kernels_that_decode_do_not_spill(monkeypatch):
    try:
        check_installed()
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.chdir(Path(__file__).parents[2])
    table = "tests.gpu_compile.coded_cases:cases"
    records = compile_cases(table, list(VARIANTS), TARGETS["h200"])
    assert failures_of(records) == []
    assert all(record["pallas_launches"] == 2 for record in records)
