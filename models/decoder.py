"""A Llama-architecture decoder in Flax NNX whose attention is handed in from outside.

RMSNorm, rotary embedding (Su et al., arXiv 2104.09864, in the "rotate half" layout of Hugging Face
checkpoints), grouped-query attention (Ainslie et al., arXiv 2305.13245) and SwiGLU (Shazeer, arXiv
2002.05202). The weights of all layers are stacked on a leading L axis and `lax.scan` runs over
them, so that compile time does not grow with depth; the KV pool travels in the scan's carry, where
XLA updates it in place. On a GPU the scan is not worth its price: every step copies a layer's
weights out of the stack, as many bytes again as the products read, twice. There each layer has its
own arrays, and the layers are unrolled.

Projections are stored `[in, out]`, with Q, K, V side by side and gate and up side by side: on CPU
`[in, out]` is up to a quarter faster than `[out, in]` for 8 to 32 tokens, and fewer, wider products
suit a GPU at no cost on CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_chunkattn.model_interface import Attend, Pool
from models.config import DecoderConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


def project(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`x [T, in] @ weight [in, out] -> [T, out]`; float32 operands are multiplied in full float32.

    Without the explicit precision a GPU would round float32 operands to TF32.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.matmul(x, weight, precision=precision, preferred_element_type=out_dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x [T, E]` over its root mean square, times `scale [E]`; computed in float32."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (normed * scale.astype(jnp.float32)[None, :]).astype(x.dtype)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, each `[T, 1, D/2]` float32, of `positions [T]`."""
    exponents = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequencies = 1.0 / (theta**exponents)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each pair `(i, i + D/2)` of `x [T, H, D]` by its angle; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Block(nnx.Module):
    """One layer. Where `Decoder` scans, every weight has an extra leading L axis."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        hidden, inner = config.hidden_size, config.intermediate_size
        qkv_size = config.query_size + 2 * config.kv_size
        normal = nnx.initializers.normal(stddev=hidden**-0.5)
        down_normal = nnx.initializers.normal(stddev=inner**-0.5)
        self.config = config
        self.attention_norm = nnx.Param(jnp.ones((hidden,), dtype))
        self.qkv = nnx.Param(normal(rngs.params(), (hidden, qkv_size), dtype))
        self.attention_out = nnx.Param(normal(rngs.params(), (config.query_size, hidden), dtype))
        self.mlp_norm = nnx.Param(jnp.ones((hidden,), dtype))
        self.gate_up = nnx.Param(normal(rngs.params(), (hidden, 2 * inner), dtype))
        self.down = nnx.Param(down_normal(rngs.params(), (inner, hidden), dtype))

    def __call__(
        self,
        x: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        pool: Pool,
        layer: jax.Array,
        attend: Attend,
    ) -> tuple[jax.Array, Pool]:
        """`x [T, E] -> [T, E]`, and the pool after `attend` wrote this layer's keys and values."""
        epsilon = self.config.rms_norm_eps
        q, k, v = self._heads(rms_norm(x, self.attention_norm[...], epsilon))
        attended, pool = attend(pool, layer, rotate(q, *rotary), rotate(k, *rotary), v)
        attended = attended.astype(x.dtype).reshape(x.shape[0], self.config.query_size)
        x = x + project(attended, self.attention_out[...])
        gate_up = project(rms_norm(x, self.mlp_norm[...], epsilon), self.gate_up[...])
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return x + project(jax.nn.silu(gate) * up, self.down[...]), pool

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Project `x [T, E]` to q `[T, Hq, D]`, k and v `[T, Hkv, D]`."""
        config = self.config
        heads = project(x, self.qkv[...]).reshape(x.shape[0], -1, config.head_dim)
        q, k, v = jnp.split(
            heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1
        )
        return q, k, v


class Decoder(nnx.Module):
    """A `jax_chunkattn.model_interface.DecoderModel` with weights and activations in `dtype`.

    Norms and rotary angles are computed in float32 whatever `dtype` is, and logits are float32.
    `Decoder(config, rngs=...)` draws random weights; `models.load` reads them from a file. `unroll`
    gives each layer arrays of its own instead of a part of stacked ones.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype | str = "float32",
        unroll: bool = False,
    ):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.cache_spec = config.cache_spec
        self.vocab_size = config.vocab_size
        self.max_positions = config.max_positions

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs, dtype=dtype)

        normal = nnx.initializers.normal(stddev=config.hidden_size**-0.5)
        embedding_shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(normal(rngs.params(), embedding_shape, dtype))
        if unroll:
            layers = range(config.num_layers)
            self.blocks = nnx.List(Block(config, rngs=rngs, dtype=dtype) for _ in layers)
        else:
            self.blocks = stacked_blocks(rngs)
        self.final_norm = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        if not config.tie_embeddings:
            self.unembedding = nnx.Param(normal(rngs.params(), embedding_shape[::-1], dtype))

    def __call__(
        self, tokens: jax.Array, positions: jax.Array, pool: Pool, attend: Attend
    ) -> tuple[jax.Array, Pool]:
        """Hidden states `[T, E]` before the final norm, of `tokens [T]` at `positions [T]` (int32).

        `attend` is called once per layer (see `model_interface.Attend`). A token id outside the
        vocabulary is clamped into it: callers check ids on the host.
        """
        x = self.embedding[...].at[tokens].get(mode="clip")
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        if isinstance(self.blocks, nnx.List):
            for layer, block in enumerate(self.blocks):
                x, pool = block(x, rotary, pool, jnp.int32(layer), attend)
            return x, pool
        graphdef, stacked = nnx.split(self.blocks)

        def run_layer(carry, scanned):
            x, pool = carry
            weights, layer = scanned
            return nnx.merge(graphdef, weights)(x, rotary, pool, layer, attend), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        (x, pool), _ = lax.scan(run_layer, (x, pool), (stacked, layers))
        return x, pool

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and unembedding: `hidden [R, E] -> [R, V]` float32."""
        normed = rms_norm(hidden, self.final_norm[...], self.config.rms_norm_eps)
        tied = self.config.tie_embeddings
        unembedding = self.embedding[...].T if tied else self.unembedding[...]
        return project(normed, unembedding, out_dtype=jnp.dtype(jnp.float32))
