"""Products and sums of rows with the compiled kernel, the same bits for a row in any company."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.native import library


def multiply(
    x: Float[Array, "T K"],
    weights: Float[Array, "L M N"],
    layer: int | Int32[Array, ""],
    *,
    transposed: bool = False,
) -> Float[Array, "T O"]:
    """Rows times a layer's weights `[K, O]`, or `[O, K]` if they are transposed, read where they
    lie; summed in float32."""
    columns = weights.shape[1 if transposed else 2]
    output = jax.ShapeDtypeStruct((len(x), columns), jnp.float32)
    operands = x.astype(jnp.float32), weights, jnp.asarray(layer, jnp.int32)
    return library.call(library.PRODUCT, operands, output, transposed=transposed)


def sum_rows(x: Float[Array, "R N"]) -> Float[Array, " R"]:
    """The sum of each row, in float32."""
    output = jax.ShapeDtypeStruct(x.shape[:1], jnp.float32)
    return library.call(library.ROW_SUMS, (x.astype(jnp.float32),), output)


def exponentials(x: Float[Array, "R N"], most: Float[Array, " R"]) -> Float[Array, "R N"]:
    """`e^(x - most)` of each row, in float32; 0 where it is below 1e-38."""
    output = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    operands = x.astype(jnp.float32), most.astype(jnp.float32)
    return library.call(library.EXPONENTIALS, operands, output)
