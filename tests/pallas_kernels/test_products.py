from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import products
from pallas_kernels.implementations import NATIVE
from pallas_kernels.native import DTYPES
from pallas_kernels.targets import H200, use_target
from tests.interpreted import skip_unless_there

LAYERS, ROWS = 3, 70


@pytest.fixture(autouse=True)
def _compiled():
    skip_unless_there(NATIVE)


def random(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_times_weights_of_a_layer(dtype):
    x, weights = random(ROWS, 5, 8), random(LAYERS, 5, 8, 3, 11, dtype=dtype)
    output = products.multiply(x, weights, jnp.int32(1))
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(weights[1], np.float64), 2)
    assert output.dtype == jnp.float32
    assert output.shape == exact.shape
    np.testing.assert_allclose(output, exact, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(products.multiply(x, weights[1]), output)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_times_transposed_weights(dtype):
    x, weights = random(ROWS, 40), random(LAYERS, 33, 40, dtype=dtype)
    output = products.multiply(x, weights, 2, transposed=True)
    exact = np.asarray(x, np.float64) @ np.asarray(weights[2], np.float64).T
    np.testing.assert_allclose(output, exact, rtol=0, atol=2e-5)


def bits(array):
    return np.asarray(array).view(np.uint32)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_has_the_same_bits_among_any_number_of_others(transposed):
    weights = random(200, 150) if transposed else random(150, 200)
    x = random(300, 150)
    multiply = jax.jit(lambda x: products.multiply(x, weights, transposed=transposed))
    among_all = bits(multiply(x))
    for begin, end in ((0, 1), (7, 9), (3, 6), (100, 113), (40, 104), (12, 290)):
        np.testing.assert_array_equal(bits(multiply(x[begin:end])), among_all[begin:end])


def test_sums_of_rows():
    x = random(9, 5, 1003)
    sums = products.sum_rows(x)
    np.testing.assert_allclose(sums, np.asarray(x, np.float64).sum(-1), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(bits(products.sum_rows(x[4, 2])), bits(sums[4, 2]))


def test_exponentials():
    x = jnp.concatenate([random(70, 1003) * 30, jnp.full((70, 1), -jnp.inf)], axis=1)
    most = x.max(axis=1)
    found = products.exponentials(x, most)
    exact = np.exp(np.asarray(x - most[:, None]).astype(np.float64))
    np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-37)
    assert (np.asarray(found[:, -1]) == 0).all()
    some = products.exponentials(x[3:5], most[3:5])
    np.testing.assert_array_equal(bits(some), bits(found[3:5]))
    assert np.isnan(products.exponentials(x[:1], jnp.array([jnp.nan]))).all()


def test_nothing_is_a_sum_of_nothing():
    assert (np.asarray(products.multiply(jnp.ones((70, 0)), jnp.ones((0, 5)))) == 0).all()
    assert products.multiply(jnp.ones((0, 4)), jnp.ones((4, 5))).shape == (0, 5)
    assert products.multiply(jnp.ones((3, 4)), jnp.ones((4, 0))).shape == (3, 0)
    assert (np.asarray(products.sum_rows(jnp.ones((3, 0)))) == 0).all()
    with pytest.raises(Exception, match="weights of no layer"):
        jax.block_until_ready(products.multiply(jnp.ones((2, 5)), jnp.ones((0, 5, 3)), 0))


def test_they_may_be_mapped():
    x, weights = random(4, 6, 16), random(16, 24)
    mapped = jax.vmap(lambda x: products.multiply(x, weights))(x)
    np.testing.assert_array_equal(mapped, [products.multiply(one, weights) for one in x])


def test_weights_for_another_input_are_refused():
    with pytest.raises(ValueError, match=r"rows of shape \(5,\) and weights for \(4,\)"):
        products.multiply(random(2, 5), random(4, 3))
    with pytest.raises(ValueError, match=r"rows of shape \(5,\) and weights for \(4,\)"):
        products.multiply(random(2, 5), random(LAYERS, 3, 4), 0, transposed=True)


def test_it_says_why_it_cannot_run():
    assert products.problem([random(2, 2)]) is None
    assert products.problem([jax.ShapeDtypeStruct((2,), jnp.int8)]) == (
        "it reads float32, bfloat16, float16, not int8"
    )
    with use_target(H200):
        assert "is for CPUs" in str(products.problem([random(2, 2)]))
