"""Writing into a pool: what lands where, with the compiled kernel and with XLA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.native import library, writes
from pallas_kernels.native.build import BuildError
from pallas_kernels.pool_writes import copy_slots, put_tokens
from pallas_kernels.targets import H200, use_target
from tests.interpreted import skip_unless_there
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place

LAYERS, HEADS, SLOTS, SIZE, DIM = 2, 3, 7, 4, 8
RANDOM = np.random.default_rng(0)
POOL = RANDOM.standard_normal((LAYERS, HEADS, SLOTS, SIZE, DIM), np.float32)
TOKENS = jnp.asarray(RANDOM.standard_normal((5, HEADS, DIM), np.float32))
OFFSETS = np.array([0, 1, 3, 2, 0], np.int32)
OF_ALL = np.array([6, 0, SLOTS, 2, 3], np.int32)  # the third is dropped
OF_EACH = np.array([[6, 0, SLOTS, 2, 3], [1, SLOTS, 2, 2, 0], [5, 4, 3, SLOTS + 9, 1]], np.int32)


@pytest.fixture(params=["native", "xla"])
def dtype(request: pytest.FixtureRequest) -> jnp.dtype:
    """Of a pool that one or the other writes here."""
    if request.param == "native":
        skip_unless_there("native")
    return jnp.dtype("bfloat16" if request.param == "native" else "float32")


@pytest.mark.parametrize("slots", [OF_ALL, OF_EACH], ids=["of all heads", "of each"])
def test_tokens_are_where_they_belong(dtype, slots):
    pool = jnp.asarray(POOL, dtype)
    got = jax.jit(put_tokens)(pool, TOKENS, 1, slots, OFFSETS)
    expected = np.array(pool)
    for token, offset in enumerate(OFFSETS):
        for head in range(HEADS):
            slot = slots[token] if slots.ndim == 1 else slots[head, token]
            if slot < SLOTS:
                expected[1, head, slot, offset] = np.asarray(TOKENS)[token, head].astype(dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("axis", [1, 2])
def test_slots_are_copied_before_any_is_written(dtype, axis):
    array = jnp.asarray(POOL, dtype)
    last = array.shape[axis]
    sources, destinations = np.array([0, 1, 2], np.int32), np.array([1, 0, last], np.int32)
    got = copy_slots(array, sources, destinations, axis)
    expected = np.array(array)
    before = (slice(None),) * axis
    expected[*before, [1, 0]] = expected[*before, [0, 1]]
    np.testing.assert_array_equal(got, expected)


def test_what_is_not_donated_stays():
    skip_unless_there("native")
    pool = jnp.asarray(POOL, "bfloat16")
    before = np.array(pool)
    put_tokens(pool, TOKENS, 0, OF_ALL, OFFSETS)
    np.testing.assert_array_equal(pool, before)


def test_nothing_to_write_writes_nothing():
    skip_unless_there("native")
    pool = jnp.asarray(POOL, "bfloat16")
    none = np.zeros(0, np.int32)
    np.testing.assert_array_equal(put_tokens(pool, TOKENS[:0], 0, none, none), pool)


@pytest.mark.optimised
def test_a_bfloat16_array_is_updated_in_place_in_a_loop():
    skip_unless_there("native")
    pool = jnp.zeros((LAYERS, HEADS, 4000, SIZE, DIM), "bfloat16")

    def run(pool):
        def step(at, pool):
            return put_tokens(
                pool, TOKENS + at.astype(jnp.float32), at % LAYERS, OF_ALL + at, OFFSETS
            )

        return jax.lax.fori_loop(jnp.int32(0), jnp.int32(5), step, pool)

    program = jax.jit(run, donate_argnums=0).lower(pool).compile()
    assert_pool_is_updated_in_place(
        program, pool_bytes=pool.nbytes, layer_bytes=pool.nbytes // LAYERS
    )


def test_xla_writes_where_there_is_no_compiled_kernel(monkeypatch):
    def refuse(*_):
        raise AssertionError("the compiled kernel was used")

    monkeypatch.setattr(writes, "put_tokens", refuse)
    pool = jnp.asarray(POOL, "bfloat16")
    with use_target(H200):
        jax.jit(put_tokens).trace(pool, TOKENS, 0, OF_ALL, OFFSETS)
    monkeypatch.setattr(library, "problem", lambda: str(BuildError("none")))
    got = put_tokens(pool, TOKENS, 0, OF_ALL, OFFSETS)
    assert np.abs(np.asarray(got, np.float32) - np.asarray(pool, np.float32)).max() > 0


def test_too_many_rows_are_refused():
    skip_unless_there("native")
    pool = jax.ShapeDtypeStruct((1, 1, 2**30, 4, 1), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((1, 1, 1), jnp.bfloat16)
    at = jax.ShapeDtypeStruct((1,), jnp.int32)
    with pytest.raises(ValueError, match="4,294,967,296 rows has too many"):
        jax.eval_shape(lambda pool, new, at: put_tokens(pool, new, 0, at, at), pool, new, at)
