"""A decoder in Flax NNX whose attention is handed in from outside.

One decoder serves all architectures: `DecoderConfig` says how they differ. The weights of all
layers are stacked on a leading L axis and `lax.scan` runs over them, so that compile time does not
grow with depth; the KV pool is in the scan's carry, where XLA updates it in place. On a GPU the
scan costs too much: every step copies a layer's weights out of the stack, which moves twice the
bytes that the products read. There each layer has its own arrays, and the layers are unrolled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jax_chunkattn.device.model_interface import Attend, Pool
from models.arithmetic import XLA, Arithmetic, NativeArithmetic
from models.config import DecoderConfig
from models.rope import Angles, rotate
from models.weights import BlockWeights, Weight, block_weights, decoder_weights
from pallas_kernels import products
from pallas_kernels.implementations import ImplementationError
from pallas_kernels.softcap import cap_scores
from pallas_kernels.tree_attention import KEPT

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def project(
    x: jax.Array, weight: nnx.Param, bias: nnx.Param | None, arithmetic: Arithmetic
) -> jax.Array:
    """`x [T, *in]` times `weight [*in, *out]`, plus `bias [*out]` where there is one."""
    output = arithmetic.multiply(x, weight[...])
    return output if bias is None else output + bias[...][None]


def normalise(
    x: jax.Array,
    scale: nnx.Param | None,
    bias: nnx.Param | None,
    epsilon: float,
    arithmetic: Arithmetic,
) -> jax.Array:
    """The layer norm of `x [T, ..., *S]`, its RMS norm without `bias`, itself without `scale`."""
    if scale is None:
        return x
    if bias is None:
        return rms_norm(x, scale[...], epsilon, arithmetic)
    return layer_norm(x, scale[...], bias[...], epsilon, arithmetic)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float, arithmetic: Arithmetic) -> jax.Array:
    """`x [T, ..., *S]` over its root mean square, times `scale [*S]`; computed in float32."""
    wide = x.astype(jnp.float32)
    square = arithmetic.mean(jnp.square(wide), scale.ndim)
    return (wide * lax.rsqrt(square + epsilon) * _like(scale, x.ndim)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, arithmetic: Arithmetic
) -> jax.Array:
    """`x [T, E]` minus its mean, over its standard deviation, times `scale [E]` plus `bias [E]`."""
    wide = x.astype(jnp.float32)
    centred = wide - arithmetic.mean(wide, 1)
    variance = arithmetic.mean(jnp.square(centred), 1)
    normed = centred * lax.rsqrt(variance + epsilon)
    return (normed * _like(scale, x.ndim) + _like(bias, x.ndim)).astype(x.dtype)


def _like(weight: jax.Array, rank: int) -> jax.Array:
    """`weight` in float32, with axes before its own up to `rank`."""
    return weight.astype(jnp.float32).reshape((1,) * (rank - weight.ndim) + weight.shape)


MakeParameter = Callable[[Weight], nnx.Param]


def _optional(make: MakeParameter, weight: Weight | None) -> nnx.Param | None:
    return None if weight is None else make(weight)


class Block(nnx.Module):
    """One layer. Where `Decoder` scans, every weight has an extra leading L axis.

    `BlockWeights` says what each weight is; a weight that the config does not have is None.
    """

    def __init__(self, config: DecoderConfig, weights: BlockWeights, make: MakeParameter):
        optional = partial(_optional, make)
        self.config = config
        self.attention_norm = optional(weights.attention_norm)
        self.attention_norm_bias = optional(weights.attention_norm_bias)
        self.mlp_norm = optional(weights.mlp_norm)
        self.mlp_norm_bias = optional(weights.mlp_norm_bias)
        self.attention_post_norm = optional(weights.attention_post_norm)
        self.attention_post_norm_bias = optional(weights.attention_post_norm_bias)
        self.mlp_post_norm = optional(weights.mlp_post_norm)
        self.mlp_post_norm_bias = optional(weights.mlp_post_norm_bias)
        self.qkv = make(weights.qkv)
        self.attention_out = make(weights.attention_out)
        self.qkv_bias = optional(weights.qkv_bias)
        self.attention_out_bias = optional(weights.attention_out_bias)
        self.query_norm = optional(weights.query_norm)
        self.key_norm = optional(weights.key_norm)
        self.gate_up = optional(weights.gate_up)
        self.up = optional(weights.up)
        self.down = make(weights.down)
        self.gate_up_bias = optional(weights.gate_up_bias)
        self.up_bias = optional(weights.up_bias)
        self.down_bias = optional(weights.down_bias)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles | None,
        pool: Pool,
        layer: jax.Array,
        attend: Attend,
        arithmetic: Arithmetic,
    ) -> tuple[jax.Array, Pool]:
        """`x [T, E] -> [T, E]`, and the pool after `attend` wrote this layer's keys and values."""
        norm = partial(normalise, epsilon=self.config.norm_epsilon, arithmetic=arithmetic)
        normed = norm(x, self.attention_norm, self.attention_norm_bias)
        attended, pool = self._attention(normed, angles, pool, layer, attend, arithmetic)
        x = x + norm(attended, self.attention_post_norm, self.attention_post_norm_bias)
        output = self._mlp(norm(x, self.mlp_norm, self.mlp_norm_bias), arithmetic)
        return x + norm(output, self.mlp_post_norm, self.mlp_post_norm_bias), pool

    def _attention(
        self,
        x: jax.Array,
        angles: Angles | None,
        pool: Pool,
        layer: jax.Array,
        attend: Attend,
        arithmetic: Arithmetic,
    ) -> tuple[jax.Array, Pool]:
        config = self.config
        heads = project(x, self.qkv, self.qkv_bias, arithmetic)  # [T, Hkv, G + 2, D]
        q = heads[:, :, :-2].reshape(len(x), config.num_heads, config.head_dim)
        k, v = heads[:, :, -2], heads[:, :, -1]
        q = normalise(q, self.query_norm, None, config.norm_epsilon, arithmetic)
        k = normalise(k, self.key_norm, None, config.norm_epsilon, arithmetic)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        attended, pool = attend(pool, layer, q, k, v)
        attended = attended.astype(x.dtype)
        return project(attended, self.attention_out, self.attention_out_bias, arithmetic), pool

    def _mlp(self, x: jax.Array, arithmetic: Arithmetic) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        if self.gate_up is not None:
            gate_up = project(x, self.gate_up, self.gate_up_bias, arithmetic)  # [T, 2, F]
            inner = activation(gate_up[:, 0]) * gate_up[:, 1]
        else:
            assert self.up is not None
            inner = activation(project(x, self.up, self.up_bias, arithmetic))
        return project(inner, self.down, self.down_bias, arithmetic)


class Decoder(nnx.Module):
    """A `jax_chunkattn.DecoderModel` with weights and activations in `dtype`.

    Norms and rotary angles are computed in float32 whatever `dtype` is, and logits are float32.
    `Decoder(config, rngs=...)` draws random weights; `models.load` reads them from a checkpoint.
    `unroll` gives each layer arrays of its own instead of a part of stacked ones. With `remat`, a
    backward pass computes each layer again from what it was given and what `attend` named `KEPT`.
    """

    blocks: Block | nnx.List
    remat: bool = False
    arithmetic: Arithmetic = XLA

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

        weights = decoder_weights(config)
        self.embedding = draw(weights.embedding)
        self.position_embedding = _optional(draw, weights.position_embedding)
        self.final_norm = draw(weights.final_norm)
        self.final_norm_bias = _optional(draw, weights.final_norm_bias)
        self.unembedding = _optional(draw, weights.unembedding)
        if unroll:
            one = block_weights(config)
            self.blocks = nnx.List(Block(config, one, draw) for _ in range(config.num_layers))
        else:
            self.blocks = Block(config, weights.blocks, draw)

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

        run_block = self._run_block(attend)
        if isinstance(self.blocks, nnx.List):
            for layer, block in enumerate(self.blocks):
                weights = nnx.split(block)
                x, pool = run_block(*weights, x, angles_of(kinds[layer]), pool, jnp.int32(layer))
            return x, pool
        whole = self.projections if self.arithmetic.in_place else ()
        graphdef, in_place, stacked = nnx.split(self.blocks, lambda path, _: path[-1] in whole, ...)
        all_alike = len(set(kinds)) == 1

        def run_layer(carry, scanned):
            x, pool = carry
            weights, layer, kind = scanned
            angles = angles_of(0 if all_alike else kind)
            weights = nnx.merge_state(in_place, weights)
            return run_block(graphdef, weights, x, angles, pool, layer), None

        layers = jnp.arange(self.config.num_layers, dtype=jnp.int32)
        scanned = stacked, layers, jnp.array(kinds, jnp.int32)
        (x, pool), _ = lax.scan(run_layer, (x, pool), scanned)
        return x, pool

    def _run_block(self, attend: Attend) -> Callable[..., tuple[jax.Array, Pool]]:
        """Runs a layer that is taken apart; in a backward pass from the start, where it should."""
        scanned = not isinstance(self.blocks, nnx.List)

        def run(graphdef, weights, x, angles, pool, layer):
            arithmetic = self.arithmetic.of_layer(layer) if scanned else self.arithmetic
            block = nnx.merge(graphdef, weights)
            return block(x, angles, pool, layer, attend, arithmetic)

        if not self.remat:
            return run
        kept = jax.checkpoint_policies.save_only_these_names(KEPT)
        return jax.checkpoint(run, prevent_cse=not scanned, policy=kept, static_argnums=0)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and unembedding: `hidden [R, E] -> [R, V]` float32."""
        tied = self.unembedding is None
        unembedding = self.embedding[...] if self.unembedding is None else self.unembedding[...]
        logits = self.arithmetic.multiply(
            self.normed(hidden), unembedding, transposed=tied, out_dtype=jnp.dtype(jnp.float32)
        )
        return cap_scores(logits, self.config.logit_softcap)

    def normed(self, hidden: jax.Array) -> jax.Array:
        """The final norm: `hidden [R, E] -> [R, E]`."""
        epsilon = self.config.norm_epsilon
        return normalise(hidden, self.final_norm, self.final_norm_bias, epsilon, self.arithmetic)

    @property
    def projections(self) -> frozenset[str]:
        """The names of a layer's weights that its products are with."""
        weights = block_weights(self.config).by_name()
        return frozenset(name for name, weight in weights.items() if weight.inputs)

    def for_serving(self, *, batch_invariant: bool = False) -> Decoder:
        """The same decoder, over the same arrays, as it is fastest where nothing is differentiated:
        on a CPU with products by the compiled kernel, where it can run. It has no derivatives.

        A subclass that computes more than this, or otherwise, must answer for that itself.

        Args:
          batch_invariant: what is computed of a token is to be the same bits whatever else is
            computed with it.

        Raises:
          ImplementationError: when that is asked for and the kernel cannot run, with the reason.
        """
        graphdef, state = nnx.split(self)
        multiplied = {*self.projections, "embedding", "unembedding"}
        weights = [leaf for path, leaf in nnx.to_flat_state(state) if path[-1] in multiplied]
        problem = products.problem(jax.tree.leaves(weights))
        if problem is not None and batch_invariant:
            raise ImplementationError(
                "products of this model are not batch-invariant without the compiled kernel: "
                f"{problem}"
            )
        served = nnx.merge(graphdef, state)
        served.arithmetic = XLA if problem is not None else NativeArithmetic(batch_invariant)
        return served

    def _embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        x = self.embedding[...].at[tokens].get(mode="clip")
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        if self.position_embedding is not None:
            x = x + self.position_embedding[...].at[positions].get(mode="clip")
        return x
