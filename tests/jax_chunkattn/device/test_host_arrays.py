"""Arrays of the host travel as one and come out as they were."""

from __future__ import annotations

import chex
import jax
import numpy as np
import pytest

from jax_chunkattn.device.host_arrays import HostArrays, join


def test_every_bit_comes_through():
    random = np.random.default_rng(0)
    tree = {
        "floats": np.array([0.1, -0.0, np.nan, np.inf, 1e-42], np.float32),
        "seeds": np.array([[0, 2**32 - 1]], np.uint32),
        "flags": random.integers(0, 2, (3, 5)) > 0,
        "ids": (random.integers(-9, 9, (2, 3, 4)).astype(np.int32), None, np.asarray(7, np.int32)),
        "none": np.zeros((0, 4), np.int32),
    }
    given = HostArrays.of(tree)
    joined = join(tree)
    assert joined.dtype == np.int32
    assert joined.shape == (given.size,) == (5 + 2 + 15 + 24 + 1,)
    for split in (given.split, jax.jit(given.split)):
        found = jax.tree.map(np.asarray, split(jax.numpy.asarray(joined)))
        chex.assert_trees_all_equal_shapes_and_dtypes(found, tree)
        for one, other in zip(*map(jax.tree.leaves, (found, tree)), strict=True):
            assert one.tobytes() == other.tobytes()


def test_numbers_of_another_size_are_refused():
    with pytest.raises(TypeError, match="32-bit numbers or booleans, not int64"):
        join([np.zeros(3, np.int64)])
