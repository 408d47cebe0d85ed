"""Keys and values that are given, written into a chunk of a pool."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import CacheConfig, allocate_pool
from jax_chunkattn.device.exact_pool import ChunkPool
from jax_chunkattn.device.programs import Invocation, Programs
from jax_chunkattn.device.request_table import DeviceState, RequestTable, write_chunk
from tests.jax_chunkattn.device.pool_copies import assert_pool_is_updated_in_place
from tests.jax_chunkattn.engine.behind import prefix_of
from tests.jax_chunkattn.toy import toy_model


def chunk(number: int) -> np.ndarray:
    return np.asarray(number, np.int32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_chunk_is_what_was_given_and_the_others_are_as_they_were(dtype):
    keys, values = prefix_of(8)
    values = values.copy()
    values[0, 0, 0, :2] = np.nan, np.inf
    pool = allocate_pool(toy_model().cache_spec, CacheConfig(5, 8, dtype))
    pool = jax.tree.map(lambda array: array + 1, pool)
    write = jax.jit(ChunkPool.write_chunk, donate_argnums=0)
    found = write(pool, chunk(3), chunk(0), keys, values)
    finite = np.asarray(jnp.nan_to_num(jnp.asarray(values).astype(dtype)), np.float32)
    for array, given in ((found.keys, keys.astype(found.keys.dtype)), (found.values, finite)):
        array = np.asarray(array, np.float32)
        np.testing.assert_array_equal(array[:, :, 3], given.astype(np.float32))
        assert (np.delete(array, 3, axis=2) == 1).all()


def test_the_chunk_behind_the_last_drops_it():
    pool = allocate_pool(toy_model().cache_spec, CacheConfig(5, 8))
    found = pool.write_chunk(chunk(5), chunk(0), *map(jnp.asarray, prefix_of(8)))
    assert not np.asarray(found.keys).any()
    assert not np.asarray(found.values).any()


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_pool_is_updated_in_place(dtype):
    model = toy_model()
    pool = allocate_pool(model.cache_spec, CacheConfig(4_000, 16, dtype))
    state = DeviceState(pool, RequestTable.empty(4, model.vocab_size))
    program, _ = Programs().compiled(
        Invocation(write_chunk, None, (state, chunk(0), chunk(0), *prefix_of(16)))
    )
    half = pool.keys.nbytes
    assert_pool_is_updated_in_place(
        program, pool_bytes=2 * half, layer_bytes=half // model.cache_spec.num_layers
    )
