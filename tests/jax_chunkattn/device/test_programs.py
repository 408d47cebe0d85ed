"""Programs are compiled once, live as long as somebody keeps them, and never kill the process."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn.device import memory_maps
from jax_chunkattn.device.programs import MAPS_PER_PROGRAM, Invocation, Programs


def double(x):
    return 2 * x


def of_size(size):
    return Invocation(double, None, (np.arange(size, dtype=np.float32),))


def call(programs, size):
    """Whether it had to be compiled."""
    invocation = of_size(size)
    program, seconds = programs.compiled(invocation)
    np.testing.assert_array_equal(program([], *invocation.args), 2 * np.arange(size))
    return seconds > 0


def test_a_program_is_compiled_once_for_each_shape():
    programs = Programs()
    assert [call(programs, size) for size in (1, 2, 1, 2, 3)] == [True, True, False, False, True]


def test_of_those_that_nobody_keeps_the_last_used_are_there():
    programs = Programs(most=2)
    assert [call(programs, size) for size in (1, 2, 1, 3)] == [True, True, False, True]
    assert [call(programs, size) for size in (1, 3, 2)] == [False, False, True]


def test_those_that_somebody_keeps_are_there_however_many_come_after():
    programs = Programs(most=2)
    kept = [programs.compiled(of_size(size))[0] for size in range(1, 6)]
    assert not any(call(programs, size) for size in range(1, 6))
    together, compiled = programs.compile_all(map(of_size, (4, 5, 6, 6, 7, 8)), threads=2)
    assert (len(together), compiled) == (5, 3)
    assert not any(call(programs, size) for size in range(1, 9))
    del kept, together
    assert [call(programs, size) for size in (7, 8, 1)] == [False, False, True]


def test_threads_that_want_the_same_programs_all_get_them():
    programs = Programs(most=1)
    failed = []

    def work():
        try:
            for size in (1, 2, 3) * 6:
                call(programs, size)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_process_without_room_refuses_to_compile_instead_of_dying(monkeypatch):
    """Programs that nobody keeps make room first; those that are there go on."""
    programs = Programs()
    kept, _ = programs.compiled(of_size(1))
    call(programs, 2)
    monkeypatch.setattr(memory_maps, "room", lambda: MAPS_PER_PROGRAM - 1)
    with pytest.raises(RuntimeError, match=r"499 more memory maps, .* and 1 are in use; close"):
        programs.compiled(of_size(3))
    with pytest.raises(RuntimeError, match="no room to compile"):
        programs.compile_all([of_size(3)], threads=1)
    assert not call(programs, 1)
    monkeypatch.undo()
    assert call(programs, 2)
    assert kept is programs.compiled(of_size(1))[0]


def test_the_room_for_maps_is_what_linux_leaves():
    before = memory_maps.room()
    assert 0 < before
    assert memory_maps.room() == pytest.approx(before, abs=200)


def test_types_are_the_same_with_jax_enable_x64():
    invocation = Invocation(lambda x: x + jnp.ones(3), None, (np.arange(3, dtype=np.float32),))
    with jax.enable_x64(True):
        assert invocation.lower().out_info.dtype == np.float32
