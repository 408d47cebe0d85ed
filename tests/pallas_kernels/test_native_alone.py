"""The compiled kernel without JAX around it, built by the system's compiler in several ways."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pallas_kernels.native.build import SOURCES, BuildError, find_compiler

CHECK = Path(__file__).parent / "native" / "check.cc"
PLAIN = ("-O2", "-Wno-psabi")
ADDRESSES = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run_check(folder: Path, options: tuple[str, ...], seed: int, plans: int) -> str:
    """Builds the check with these options, and runs it on so many plans; returns what it prints."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    program = folder / "check"
    common = ("-std=c++17", "-ffp-contract=fast", "-pthread", f"-I{SOURCES}", "-o", str(program))
    subprocess.run([compiler, *common, *options, str(CHECK)], check=True, timeout=300)
    done = subprocess.run(
        [program, str(seed), str(plans)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        pytest.param((*PLAIN, "-march=native"), id="this processor"),
        pytest.param(
            (*PLAIN, "-march=native", "-DVECTOR_BYTES=64"),
            id="long vectors",
            marks=pytest.mark.thorough,
        ),
        pytest.param(PLAIN, id="the least that a processor has"),
    ],
)
@pytest.mark.slow
def test_it_is_the_definition_for_any_width_of_vectors_and_number_of_threads(tmp_path, options):
    assert float(run_check(tmp_path, options, seed=1, plans=120)) < 2e-6


@pytest.mark.slow
def test_wrong_plans_read_nothing_that_is_not_there(tmp_path):
    run_check(tmp_path, ("-march=native", *ADDRESSES), seed=2, plans=60)


@pytest.mark.slow
def test_threads_share_nothing_without_order(tmp_path):
    run_check(tmp_path, ("-march=native", "-O1", "-g", "-fsanitize=thread"), seed=3, plans=16)
