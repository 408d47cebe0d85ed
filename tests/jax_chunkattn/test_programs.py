"""Programs are compiled once, and those used last are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.programs import Invocation, Programs


def double(x):
    return 2 * x


def args(size):
    return (np.arange(size, dtype=np.float32),)


def call(programs, size):
    """Whether it had to be compiled."""
    program, seconds = programs.compiled(double, None, args(size))
    np.testing.assert_array_equal(program([], *args(size)), 2 * np.arange(size))
    return seconds > 0


def test_a_program_is_compiled_once_for_each_shape():
    programs = Programs()
    assert [call(programs, size) for size in (1, 2, 1, 2, 3)] == [True, True, False, False, True]


def test_those_used_last_are_kept():
    programs = Programs(most=2)
    assert [call(programs, size) for size in (1, 2, 1, 3)] == [True, True, False, True]
    assert [call(programs, size) for size in (1, 3, 2)] == [False, False, True]


def test_all_that_are_compiled_together_are_kept():
    programs = Programs(most=2)
    assert call(programs, 1)
    assert call(programs, 2)
    each = [Invocation(double, None, args(size)) for size in (2, 3, 4, 3)]
    assert programs.compile_all(each, threads=2) == 2
    assert [call(programs, size) for size in (2, 3, 4)] == [False, False, False]
    assert call(programs, 1)
    assert programs.compile_all(each, threads=2) == 2


def test_types_are_the_same_with_jax_enable_x64():
    invocation = Invocation(lambda x: x + jnp.ones(3), None, args(3))
    with jax.enable_x64(True):
        assert invocation.lower().out_info.dtype == np.float32
