"""Timing several functions against each other in one run, and two limits of the machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

READ_BYTES = 256 * 2**20
"""Larger than the last-level cache of the machines in view; what is in it is gone after a read."""

SETTLE = 0.03
"""Seconds. The threads of OpenMP, PyTorch's, look for more work for some 16 ms after a call, and
keep a processor from who comes next: what took 1.4 ms on two cores took twice that behind them."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one function's calls."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        milliseconds = 1e3 * np.asarray(seconds)
        return cls(*(float(f(milliseconds)) for f in (np.median, np.min, np.max)))


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, *, seed: int = 0
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Time every call `repeats` times, one after another in an order that changes each round.

    Each is called once before, to compile. Before each timed call `SETTLE` seconds pass, and then
    `READ_BYTES` of memory are read, so that its operands are in no cache. Calls return arrays,
    which are waited for.

    Returns:
      The timing of each call, and what its first call returned.
    """
    evict = next(iter(memory_reads().values()))
    jax.block_until_ready(evict())
    outputs = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    random = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for _ in range(repeats):
        for index in random.permutation(len(names)):
            time.sleep(SETTLE)
            jax.block_until_ready(evict())
            begin = time.perf_counter()
            jax.block_until_ready(calls[names[index]]())
            seconds[names[index]].append(time.perf_counter() - begin)
    return {name: Timing.of(taken) for name, taken in seconds.items()}, outputs


def matmul_size(flops: float) -> int:
    """The n for which a product of two n x n matrices takes about `flops` operations."""
    return max(1, round((flops / 2) ** (1 / 3)))


def matmul(size: int, dtype: str, *, seed: int = 0) -> Callable[[], jax.Array]:
    """A product of two square matrices; of float32 ones in full, not in TensorFloat-32."""
    factors = np.random.default_rng(seed).standard_normal((2, size, size), np.float32)
    left, right = (jnp.asarray(factor, dtype) for factor in factors)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    return lambda: product(left, right)


def memory_reads() -> dict[str, Callable[[], jax.Array]]:
    """Two ways to read `READ_BYTES` of memory: as one sum, and as sums of 64 parts of it.

    Which is faster depends on the machine: on two cores with AVX-512 XLA reads 20 GB/s in the first
    way and 11 in the second.
    """
    data = jnp.ones((64, READ_BYTES // (4 * 64)), jnp.float32)
    ways = {"one sum": lambda data: data.sum(), "64 sums": lambda data: data.sum(axis=1)}
    return {name: functools.partial(jax.jit(way), data) for name, way in ways.items()}


def fastest(timings: Mapping[str, Timing]) -> str:
    """The name with the least median."""
    return min(timings, key=lambda name: timings[name].median)
