"""How a decoder multiplies with its weights and takes means: by XLA, or by a compiled kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import products


@dataclass(frozen=True)
class Arithmetic:
    """By XLA; this can be differentiated.

    Attributes:
      in_place: products read a layer's weights in the stack of all layers'.
    """

    in_place = False

    def of_layer(self, layer: jax.Array) -> Arithmetic:
        """What multiplies with a layer's weights."""
        return self

    def multiply(
        self,
        x: jax.Array,
        weights: jax.Array,
        *,
        transposed: bool = False,
        out_dtype: Any = None,
    ) -> jax.Array:
        """`x [T, *in]` times `weights [*in, *out]`, or `[O, *in]` if transposed: `[T, *out]`, of
        the dtype of `x`.

        float32 operands are multiplied in full float32; without the explicit precision a GPU would
        round them to TF32.
        """
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        axes = x.ndim - 1
        weights = weights.T if transposed else weights
        return jnp.tensordot(
            x, weights, axes, precision=precision, preferred_element_type=out_dtype
        )

    def mean(self, x: jax.Array, axes: int) -> jax.Array:
        """Over so many of the last axes, which stay, of length 1."""
        return jnp.mean(x, axis=tuple(range(-axes, 0)), keepdims=True)


@dataclass(frozen=True)
class NativeArithmetic(Arithmetic):
    """Products by the kernel that is compiled for this CPU.

    Attributes:
      batch_invariant: means too, so that what a row gets depends on no other row.
      layer: which of stacked weights products are with; None where layers have arrays of their own.
    """

    batch_invariant: bool = False
    layer: jax.Array | None = None

    in_place = True

    def of_layer(self, layer: jax.Array) -> NativeArithmetic:
        return replace(self, layer=layer)

    def multiply(
        self,
        x: jax.Array,
        weights: jax.Array,
        *,
        transposed: bool = False,
        out_dtype: Any = None,
    ) -> jax.Array:
        output = products.multiply(x, weights, self.layer, transposed=transposed)
        return output.astype(out_dtype or x.dtype)

    def mean(self, x: jax.Array, axes: int) -> jax.Array:
        if not self.batch_invariant:
            return super().mean(x, axes)
        count = math.prod(x.shape[-axes:])
        sums = products.sum_rows(x.reshape(*x.shape[:-axes], count))
        return (sums / count).reshape(*sums.shape, *axes * (1,))


XLA = Arithmetic()
