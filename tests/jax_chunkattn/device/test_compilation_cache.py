"""One line keeps what compiles for the next process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.cache_folder import CACHE_VARIABLE, cache_dir

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax_chunkattn import use_compilation_cache
from experiments.harness.compilations import count_compilations

folder = use_compilation_cache(*sys.argv[1:])
with count_compilations() as counts:
    print(jax.jit(lambda x: x * 3.0 - 0.25)(2.0), file=sys.stderr)
print(folder, counts.compiled, counts.from_cache)
"""


def run(*arguments: str, **variables: str) -> list[str]:
    """What the program prints, in a process of its own: JAX's settings are the process's."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": ":".join(sys.path), **variables},
    )
    return finished.stdout.split()


@pytest.mark.slow
def test_the_next_process_finds_what_this_one_compiled(tmp_path: Path) -> None:
    folder, compiled, found = run(str(tmp_path))
    assert (folder, found) == (str(tmp_path), "0")
    assert int(compiled) > 0
    assert run(str(tmp_path)) == [folder, "0", compiled]


@pytest.mark.slow
def test_the_folder_is_jaxs_own_if_it_has_one_and_else_the_projects(tmp_path: Path) -> None:
    chosen = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "chosen")}
    assert run(**chosen, **{CACHE_VARIABLE: str(tmp_path / "ours")})[0].endswith("chosen")
    assert run(**{CACHE_VARIABLE: str(tmp_path / "ours")})[0] == str(tmp_path / "ours" / "jax")
    assert list((tmp_path / "ours" / "jax").iterdir())


def test_the_projects_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert cache_dir() == Path("/somewhere/jax_chunkattn")
    monkeypatch.setenv(CACHE_VARIABLE, "~/mine")
    assert cache_dir() == Path.home() / "mine"
