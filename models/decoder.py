"""A decoder in Flax NNX whose attention is handed in from outside.

One decoder for all architectures: what tells them apart is in `DecoderConfig`. The weights of all
layers are stacked on a leading L axis and `lax.scan` runs over them, so that compile time does not
grow with depth; the KV pool travels in the scan's carry, where XLA updates it in place. On a GPU
the scan is not worth its price: every step copies a layer's weights out of the stack, as many bytes
again as the products read, twice. There each layer has its own arrays, and the layers are unrolled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_chunkattn.device.model_interface import Attend, Pool
from models.config import DecoderConfig
from models.rope import Angles, rotate
from models.weights import BLOCKS, Weight, block_weights, decoder_weights
from pallas_kernels.softcap import cap_scores

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def project(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`x [T, *in]` times `weight [*in, *out]`: `[T, *out]`.

    float32 operands are multiplied in full float32; without the explicit precision a GPU would
    round them to TF32.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = x.ndim - 1
    return jnp.tensordot(x, weight, axes, precision=precision, preferred_element_type=out_dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x [T, ..., *S]` over its root mean square, times `scale [*S]`; computed in float32."""
    wide = x.astype(jnp.float32)
    axes = tuple(range(-scale.ndim, 0))
    square = jnp.mean(jnp.square(wide), axis=axes, keepdims=True)
    return (wide * lax.rsqrt(square + epsilon) * _like(scale, x.ndim)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """`x [T, E]` less its mean, over its standard deviation, times `scale [E]` plus `bias [E]`."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(variance + epsilon)
    return (normed * _like(scale, x.ndim) + _like(bias, x.ndim)).astype(x.dtype)


def _like(weight: jax.Array, rank: int) -> jax.Array:
    """`weight` in float32, with axes before its own up to `rank`."""
    return weight.astype(jnp.float32).reshape((1,) * (rank - weight.ndim) + weight.shape)


class Block(nnx.Module):
    """One layer. Where `Decoder` scans, every weight has an extra leading L axis.

    `models.weights.block_weights` says which weights a config gives it besides these.
    """

    qkv: nnx.Param
    attention_out: nnx.Param
    down: nnx.Param

    def __init__(self, config: DecoderConfig, params: dict[str, nnx.Param]):
        self.config = config
        for name, param in params.items():
            setattr(self, name, param)

    def __call__(
        self, x: jax.Array, angles: Angles | None, pool: Pool, layer: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Pool]:
        """`x [T, E] -> [T, E]`, and the pool after `attend` wrote this layer's keys and values."""
        config = self.config
        attended, pool = self._attention(
            norm(self, "attention_norm", x) if config.norm_before else x,
            angles,
            pool,
            layer,
            attend,
        )
        x = x + (norm(self, "attention_post_norm", attended) if config.norm_after else attended)
        output = self._mlp(norm(self, "mlp_norm", x) if config.norm_before else x)
        return x + (norm(self, "mlp_post_norm", output) if config.norm_after else output), pool

    def _attention(
        self, x: jax.Array, angles: Angles | None, pool: Pool, layer: jax.Array, attend: Attend
    ) -> tuple[jax.Array, Pool]:
        config = self.config
        heads = self._project("qkv", x)  # [T, Hkv, G + 2, D]
        q = heads[:, :, :-2].reshape(len(x), config.num_heads, config.head_dim)
        k, v = heads[:, :, -2], heads[:, :, -1]
        if config.query_key_norm is not None:
            q = rms_norm(q, self._weight("query_norm"), config.norm_epsilon)
            k = rms_norm(k, self._weight("key_norm"), config.norm_epsilon)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        attended, pool = attend(pool, layer, q, k, v)
        return self._project("attention_out", attended.astype(x.dtype)), pool

    def _mlp(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        if self.config.gated_mlp:
            gate_up = self._project("gate_up", x)  # [T, 2, F]
            inner = activation(gate_up[:, 0]) * gate_up[:, 1]
        else:
            inner = activation(self._project("up", x))
        return self._project("down", inner)

    def _project(self, name: str, x: jax.Array) -> jax.Array:
        output = project(x, self._weight(name))
        if not hasattr(self, f"{name}_bias"):
            return output
        return output + self._weight(f"{name}_bias")[None]

    def _weight(self, name: str) -> jax.Array:
        return getattr(self, name)[...]


def norm(module: Any, name: str, x: jax.Array) -> jax.Array:
    """The norm of `x [T, E]` that `module`'s config asks for, with its weights called `name`."""
    epsilon = module.config.norm_epsilon
    scale = getattr(module, name)[...]
    if module.config.norm == "rms":
        return rms_norm(x, scale, epsilon)
    return layer_norm(x, scale, getattr(module, f"{name}_bias")[...], epsilon)


class Decoder(nnx.Module):
    """A `jax_chunkattn.DecoderModel` with weights and activations in `dtype`.

    Norms and rotary angles are computed in float32 whatever `dtype` is, and logits are float32.
    `Decoder(config, rngs=...)` draws random weights; `models.load` reads them from a checkpoint.
    `unroll` gives each layer arrays of its own instead of a part of stacked ones.
    """

    embedding: nnx.Param
    position_embedding: nnx.Param  # only if they are learned
    unembedding: nnx.Param  # only if it is not the embedding
    blocks: Block | nnx.List

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype | str = "float32",
        unroll: bool = False,
    ):
        dtype = jnp.dtype(dtype).name
        self.config = config
        self.cache_spec = config.cache_spec
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_positions

        def draw(weight: Weight) -> nnx.Param:
            # Drawn flat: XLA takes seconds for many short axes, which LLVM unrolls.
            count = math.prod(weight.shape)
            noise = jax.random.normal(rngs.params(), (count,), weight.dtype(dtype))
            return nnx.Param((noise * weight.stddev + weight.mean).reshape(weight.shape))

        for name, weight in decoder_weights(config).items():
            if not name.startswith(BLOCKS):
                setattr(self, name, draw(weight))
        layer = block_weights(config)
        if unroll:
            layers = range(config.num_layers)
            self.blocks = nnx.List(
                Block(config, {name: draw(weight) for name, weight in layer.items()})
                for _ in layers
            )
        else:
            stacked = {name: one.stacked(config.num_layers) for name, one in layer.items()}
            self.blocks = Block(config, {name: draw(weight) for name, weight in stacked.items()})

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, pool: Pool, attend: Attend
    ) -> tuple[jax.Array, Pool]:
        """Hidden states `[T, E]` before the final norm, of `tokens [T]` at `positions [T]` (int32).

        `attend` is called once per layer (see `model_interface.Attend`). A token id outside the
        vocabulary is clamped into it: callers check ids on the host.
        """
        x = self._embed(tokens, positions)
        tables = self.config.rotary_tables
        kinds = tables.kind if tables is not None else (0,) * self.config.num_layers
        turning = tables.angles(positions) if tables is not None else None

        def angles_of(kind) -> Angles | None:
            return None if turning is None else (turning[0][kind], turning[1][kind])

        if isinstance(self.blocks, nnx.List):
            for layer, block in enumerate(self.blocks):
                x, pool = block(x, angles_of(kinds[layer]), pool, jnp.int32(layer), attend)
            return x, pool
        graphdef, stacked = nnx.split(self.blocks)
        all_alike = len(set(kinds)) == 1

        def run_layer(carry, scanned):
            x, pool = carry
            weights, layer, kind = scanned
            angles = angles_of(0 if all_alike else kind)
            return nnx.merge(graphdef, weights)(x, angles, pool, layer, attend), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        scanned = stacked, layers, jnp.array(kinds, jnp.int32)
        (x, pool), _ = lax.scan(run_layer, (x, pool), scanned)
        return x, pool

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and unembedding: `hidden [R, E] -> [R, V]` float32."""
        tied = self.config.tie_embeddings
        unembedding = self.embedding[...].T if tied else self.unembedding[...]
        normed = norm(self, "final_norm", hidden)
        logits = project(normed, unembedding, out_dtype=jnp.dtype(jnp.float32))
        return cap_scores(logits, self.config.logit_softcap)

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embedding[...].at[tokens].get(mode="clip")
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.config.learned_positions:
            x = x + self.position_embedding[...].at[positions].get(mode="clip")
        return x
