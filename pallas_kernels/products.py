"""Products of rows with weights, and sums of rows, by the kernel compiled for this CPU.

XLA multiplies with a layer of stacked weights by copying the layer out of the stack: for few rows
that takes longer than the product. The kernel reads it where it lies.

What it gives for a row depends on that row alone. XLA sums in another order for another number of
rows, so that `(x @ w)[:1]` and `x[:1] @ w` differ in their last bits: with jaxlib 0.10 and 0.12 a
row among 64 or more of a product has one result on a CPU, among 32, and alone, others; a sum over
the last axis differs below 8 rows. He et al., "Defeating Nondeterminism in LLM Inference" (Thinking
Machines, 2025), call what does not so "batch-invariant".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels import native
from pallas_kernels.targets import current_target


def problem(weights: Iterable[jax.Array | jax.ShapeDtypeStruct]) -> str | None:
    """Why the kernel cannot multiply with such weights here, if it cannot."""
    if why := native.problem_on(current_target()):
        return why
    for array in weights:
        if why := native.problem_of(array.dtype):
            return why
        sharding = getattr(array, "sharding", None)
        if sharding is not None and len(sharding.device_set) > 1:
            return "the weights are on several devices"
    return None


def multiply(
    x: Float[Array, "T ..."],
    weights: Float[Array, "*_"],
    layer: int | Int32[Array, ""] | None = None,
    *,
    transposed: bool = False,
) -> Float[Array, "T ..."]:
    """`x` times weights `[*in, *out]`, or `[O, *in]` if they are transposed; or times those of a
    layer, `[L, ...]`. Summed and given in float32. Has no gradient.

    Raises:
      ValueError: for weights of another input.
    """
    shape = weights.shape if layer is None else weights.shape[1:]
    inputs = x.ndim - 1
    found, outputs = (shape[1:], shape[:1]) if transposed else (shape[:inputs], shape[inputs:])
    if found != x.shape[1:]:
        raise ValueError(f"rows of shape {x.shape[1:]} and weights for {found}")
    rows, columns = math.prod(found), math.prod(outputs)
    layers = 1 if layer is None else weights.shape[0]
    matrices = weights.reshape(layers, *((columns, rows) if transposed else (rows, columns)))
    at = 0 if layer is None else layer
    output = _compiled().multiply(x.reshape(len(x), rows), matrices, at, transposed=transposed)
    return output.reshape(len(x), *outputs)


def sum_rows(x: Float[Array, "*rows N"]) -> Float[Array, "*rows"]:
    """The sum over the last axis, in float32."""
    rows = math.prod(x.shape[:-1])
    return _compiled().sum_rows(x.reshape(rows, x.shape[-1])).reshape(x.shape[:-1])


def exponentials(x: Float[Array, "R N"], most: Float[Array, " R"]) -> Float[Array, "R N"]:
    """`e^(x - most)` of each row, in float32; 0 where it is below 1e-38.

    XLA may compute these differently for many rows: jaxlib 0.10.2 hands them to YNNPACK then.
    """
    return _compiled().exponentials(x, most)


def _compiled() -> ModuleType:
    return import_module("pallas_kernels.native.products")
