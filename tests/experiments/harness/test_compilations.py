"""Programs kept on disk, and counted."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.harness.compilations import compilation_cache, count_compilations
from experiments.harness.errors import UserError

pytestmark = pytest.mark.usefixtures("no_compilation_cache")


def test_compilations_are_counted_once_a_program() -> None:
    double = jax.jit(lambda x: x * 2.0 + 0.5)
    three, four = jnp.ones(3), jnp.ones(4)
    with count_compilations() as counts:
        double(three)
        double(three)
        assert counts.compiled == 1
        double(four)
    double(jnp.ones(5))
    assert (counts.compiled, counts.from_cache) == (2, 0)
    assert counts.seconds > 0


def test_programs_from_the_persistent_cache_are_not_compilations(tmp_path: Path) -> None:
    argument = jnp.ones(7)

    def compile_anew() -> tuple[int, int]:
        with count_compilations() as counts:
            jax.jit(lambda x: x * 3.0 - 0.25)(argument)
        return counts.compiled, counts.from_cache

    before = dict(jax.config.values)
    with compilation_cache(tmp_path):
        assert [compile_anew(), compile_anew()] == [(1, 0), (0, 1)]
    assert compile_anew() == (1, 0)
    assert dict(jax.config.values) == before


def test_a_folder_that_the_user_chose_is_left_in_place(tmp_path: Path) -> None:
    with compilation_cache(tmp_path / "chosen"), compilation_cache(tmp_path / "ours"):
        jax.jit(lambda x: x * 5.0 - 0.75)(jnp.ones(7))
    assert list((tmp_path / "chosen").iterdir())
    assert not (tmp_path / "ours").exists()


def test_a_cache_folder_that_jax_cannot_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xff")
    with pytest.raises(UserError, match="udcff' is no text in UTF-8"), compilation_cache(folder):
        pass
