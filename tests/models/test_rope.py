"""Rotary embedding against its definition, in float64."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from models.rope import (
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    Rope,
    RotaryTables,
    YarnScaling,
    rotate,
)

DIM = 8
PLAIN = 500.0 ** (-np.arange(0, DIM, 2) / DIM)  # 1, 0.21, 0.045, 0.0095 radians a token


def turned(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Pairs (i, i + R/2) of `x [T, R]` as complex numbers, turned by `angles [T, R/2]`."""
    half = x.shape[-1] // 2
    numbers = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([numbers.real, numbers.imag], -1)


def test_pairs_turn_by_position_times_frequency():
    tables = RotaryTables.of((Rope(500.0),), DIM)
    assert tables is not None
    chex.assert_trees_all_close(tables.frequencies[0], PLAIN, rtol=1e-6)
    positions = np.array([0, 1, 7, 4000], np.int32)
    x = np.random.default_rng(0).normal(size=(4, 1, DIM)).astype(np.float32)
    cos, sin = tables.angles(jnp.asarray(positions))
    actual = rotate(jnp.asarray(x), (cos[0], sin[0]))
    expected = turned(x[:, 0], positions[:, None] * PLAIN[None])
    chex.assert_trees_all_close(actual[:, 0], expected, rtol=0, atol=3e-3)
    chex.assert_trees_all_close(actual[:3, 0], expected[:3], rtol=0, atol=1e-5)


def test_dimensions_beyond_those_that_turn_stay():
    tables = RotaryTables.of((Rope(500.0, dims=4),), DIM)
    assert tables is not None
    x = np.random.default_rng(1).normal(size=(1, 2, DIM)).astype(np.float32)
    cos, sin = tables.angles(jnp.array([3]))
    actual = np.asarray(rotate(jnp.asarray(x), (cos[0], sin[0])))
    np.testing.assert_array_equal(actual[..., 4:], x[..., 4:])
    frequencies = 500.0 ** (-np.arange(0, 4, 2) / 4)
    expected = turned(x[0, :, :4], 3 * frequencies)
    chex.assert_trees_all_close(actual[0, :, :4], expected, rtol=0, atol=1e-5)


def test_layers_that_do_not_turn_change_nothing():
    tables = RotaryTables.of((Rope(500.0), None, Rope(500.0)), DIM)
    assert tables is not None
    assert tables.kind == (0, 1, 0)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(1, 2, DIM)).astype(np.float32))
    cos, sin = tables.angles(jnp.array([9]))
    np.testing.assert_array_equal(rotate(x, (cos[1], sin[1])), x)
    assert RotaryTables.of((None, None), DIM) is None


def test_llama_3_keeps_fast_frequencies_and_stretches_slow_ones():
    context = 2 * np.pi * 100  # so that a pair turns 100 times its frequency within it
    scaling = Llama3Scaling(8.0, 1.0, 5.0, context)  # pyright: ignore[reportArgumentType]
    actual, factor = Rope(500.0, scaling).frequencies(DIM)
    ramp = (100 * PLAIN[2] - 1) / 4
    assert 0 < ramp < 1 < 5 < 100 * PLAIN[1]
    expected = [PLAIN[0], PLAIN[1], PLAIN[2] * (ramp + (1 - ramp) / 8), PLAIN[3] / 8]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert factor == 1.0


def test_yarn_ramps_over_pairs_and_warms_the_softmax():
    actual, factor = Rope(500.0, YarnScaling(4.0, 1000, beta_fast=32, beta_slow=1)).frequencies(DIM)
    # The pairs that turn 32 times and once within 1,000 tokens, rounded down and up.
    low, high = (4 * np.log(1000 / (turns * 2 * np.pi)) / np.log(500) for turns in (32, 1))
    assert (np.floor(low), np.ceil(high)) == (1, 4)
    stretched = np.array([0, 0, 1 / 3, 2 / 3])
    chex.assert_trees_all_close(actual, PLAIN / 4 * stretched + PLAIN * (1 - stretched), rtol=1e-6)
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    assert Rope(500.0, YarnScaling(4.0, 1000, attention_factor=0.5)).frequencies(DIM)[1] == 0.5


def test_linear_scaling_and_factors_divide():
    actual, _ = Rope(500.0, LinearScaling(4.0)).frequencies(DIM)
    chex.assert_trees_all_close(actual, PLAIN / 4, rtol=1e-6)
    factors = (1.0, 2.0, 3.0, 4.0)
    actual, warmer = Rope(500.0, FactorScaling(factors, 1.2)).frequencies(DIM)
    chex.assert_trees_all_close(actual, PLAIN / factors, rtol=1e-6)
    assert warmer == 1.2


def test_impossible_ropes_are_refused():
    with pytest.raises(ValueError, match="theta must be positive"):
        Rope(float("nan"))
    with pytest.raises(ValueError, match="even number of dimensions"):
        Rope(dims=3)
    with pytest.raises(ValueError, match="3 rope factors for 4 frequencies"):
        Rope(scaling=FactorScaling((1.0, 1.0, 1.0))).frequencies(DIM)
    with pytest.raises(ValueError, match=r"different numbers of dimensions: \[4, 8\]"):
        RotaryTables.of((Rope(), Rope(dims=4)), DIM)
