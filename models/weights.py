"""Every weight of a decoder, declared once: shape, logical axes, and random values.

`BlockWeights` and `DecoderWeights` have a field for each weight that a decoder can have; a weight
that a config does not have is None. The parameters of `models.decoder` have the fields' names.

Logical axes name what a dimension counts. A mapping from these names to the axes of a mesh of
devices (`jax_chunkattn.device.logical_axes`) then says how a decoder is laid out over it, without a
second list of the weights.

Layout: projections are stored input first, which on a CPU is up to a quarter faster than output
first for 8 to 32 tokens. Products that read the same input are one: a KV head's group of query
heads, its key and its value lie side by side, and so do gate and up. A shard by KV heads, or by
width of the MLP, is then a slice of one axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from models.config import DecoderConfig

BLOCKS = "blocks/"
"""Before the name of a weight of which every layer has its own."""

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class Weight:
    """The declaration of a weight.

    Attributes:
      shape, axes: its dimensions, and the logical axis of each.
      mean, stddev: of its values in a decoder with random weights.
      wide: kept in float32, whatever the dtype of the model.
      inputs: number of leading axes of a projection that are its input's; 0 for other weights.
    """

    shape: tuple[int, ...]
    axes: Axes
    mean: float = 0.0
    stddev: float = 0.0
    wide: bool = False
    inputs: int = 0

    def dtype(self, model_dtype: str) -> str:
        """Its dtype in a model of `model_dtype`."""
        return "float32" if self.wide else model_dtype

    def stacked(self, layers: int) -> Weight:
        """This weight of all layers in one array."""
        return replace(self, shape=(layers, *self.shape), axes=("layers", *self.axes))

    def unstacked(self) -> Weight:
        """One layer's part of a stacked weight."""
        return replace(self, shape=self.shape[1:], axes=self.axes[1:])


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """The weights of one layer, or stacked those of all layers.

    A scale without a bias is that of an RMS norm, with one that of a layer norm.

    Attributes:
      attention_norm, mlp_norm: of what attention and the MLP read.
      attention_post_norm, mlp_post_norm: of what they add to the residual stream.
      qkv: each KV head's group of query heads, its key and its value: `[E, Hkv, G + 2, D]`.
      attention_out: `[Hq, D, E]`.
      query_norm, key_norm: RMS norms of queries and keys: `[D]`, or `[Hq, D]` and `[Hkv, D]`.
      gate_up, up: `[E, 2, F]` of a gated MLP of width F, `[E, F]` of any other; one is None.
      down: `[F, E]`.
    """

    attention_norm: Weight | None = None
    attention_norm_bias: Weight | None = None
    mlp_norm: Weight | None = None
    mlp_norm_bias: Weight | None = None
    attention_post_norm: Weight | None = None
    attention_post_norm_bias: Weight | None = None
    mlp_post_norm: Weight | None = None
    mlp_post_norm_bias: Weight | None = None
    qkv: Weight
    attention_out: Weight
    qkv_bias: Weight | None = None
    attention_out_bias: Weight | None = None
    query_norm: Weight | None = None
    key_norm: Weight | None = None
    gate_up: Weight | None = None
    up: Weight | None = None
    down: Weight
    gate_up_bias: Weight | None = None
    up_bias: Weight | None = None
    down_bias: Weight | None = None

    def by_name(self) -> dict[str, Weight]:
        """The weights that are not None, by the names of their fields."""
        return {name: weight for name, weight in vars(self).items() if weight is not None}

    def stacked(self, layers: int) -> BlockWeights:
        return BlockWeights(**{n: weight.stacked(layers) for n, weight in self.by_name().items()})


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """All weights of a decoder.

    Attributes:
      embedding: `[V, E]`.
      position_embedding: `[max_positions, E]`, where positions are learned.
      blocks: of the layers, stacked.
      final_norm, final_norm_bias: before the unembedding, `[E]`.
      unembedding: `[E, V]`, where it is not the embedding.
    """

    embedding: Weight
    position_embedding: Weight | None = None
    blocks: BlockWeights
    final_norm: Weight
    final_norm_bias: Weight | None = None
    unembedding: Weight | None = None

    def by_name(self) -> dict[str, Weight]:
        """The weights that are not None, by name; those of the layers are named `blocks/...`."""
        found: dict[str, Weight] = {}
        for name, value in vars(self).items():
            if isinstance(value, BlockWeights):
                found |= {BLOCKS + short: weight for short, weight in value.by_name().items()}
            elif value is not None:
                found[name] = value
        return found


def decoder_weights(config: DecoderConfig) -> DecoderWeights:
    """All weights of a decoder with this config."""
    vocab, hidden = config.vocab_size, config.hidden_size
    positions = _table((config.max_positions, hidden), ("positions", "embed"))
    unembedding = _matrix((hidden, vocab), ("embed", "vocab"))
    final_norm, final_norm_bias = _norm(config)
    return DecoderWeights(
        embedding=_table((vocab, hidden), ("vocab", "embed")),
        position_embedding=positions if config.learned_positions else None,
        blocks=block_weights(config).stacked(config.num_layers),
        final_norm=final_norm,
        final_norm_bias=final_norm_bias,
        unembedding=None if config.tie_embeddings else unembedding,
    )


def num_parameters(config: DecoderConfig) -> int:
    """Number of weights, a tied embedding counted once."""
    return sum(math.prod(weight.shape) for weight in decoder_weights(config).by_name().values())


def block_weights(config: DecoderConfig) -> BlockWeights:
    """The weights of one layer."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    qkv_shape, qkv_axes = (kv_heads, heads // kv_heads + 2, dim), ("kv_heads", None, "head_dim")
    scale, scale_bias = _norm(config)
    before, before_bias = (scale, scale_bias) if config.norm_before else (None, None)
    after, after_bias = (scale, scale_bias) if config.norm_after else (None, None)
    query_norm, key_norm = _query_key_norms(config)
    gated, biased = config.gated_mlp, config.mlp_bias
    hidden_bias = Weight((hidden,), ("embed",))
    return BlockWeights(
        attention_norm=before,
        attention_norm_bias=before_bias,
        mlp_norm=before,
        mlp_norm_bias=before_bias,
        attention_post_norm=after,
        attention_post_norm_bias=after_bias,
        mlp_post_norm=after,
        mlp_post_norm_bias=after_bias,
        qkv=_matrix((hidden, *qkv_shape), ("embed", *qkv_axes)),
        attention_out=_matrix((heads, dim, hidden), ("heads", "head_dim", "embed"), inputs=2),
        qkv_bias=Weight(qkv_shape, qkv_axes) if config.qkv_bias else None,
        attention_out_bias=hidden_bias if config.attention_out_bias else None,
        query_norm=query_norm,
        key_norm=key_norm,
        gate_up=_matrix((hidden, 2, inner), ("embed", None, "mlp")) if gated else None,
        up=None if gated else _matrix((hidden, inner), ("embed", "mlp")),
        down=_matrix((inner, hidden), ("mlp", "embed")),
        gate_up_bias=Weight((2, inner), (None, "mlp")) if biased and gated else None,
        up_bias=Weight((inner,), ("mlp",)) if biased and not gated else None,
        down_bias=hidden_bias if biased else None,
    )


def _query_key_norms(config: DecoderConfig) -> tuple[Weight | None, Weight | None]:
    dim = config.head_dim
    if config.query_key_norm is None:
        return None, None
    if config.query_key_norm == "head":
        return _scale((dim,), ("head_dim",)), _scale((dim,), ("head_dim",))
    return (
        _scale((config.num_heads, dim), ("heads", "head_dim")),
        _scale((config.num_kv_heads, dim), ("kv_heads", "head_dim")),
    )


def _norm(config: DecoderConfig) -> tuple[Weight, Weight | None]:
    """Scale and bias of a norm over E."""
    shape, axes = (config.hidden_size,), ("embed",)
    return _scale(shape, axes), Weight(shape, axes, wide=True) if config.norm == "layer" else None


def _table(shape: tuple[int, int], axes: Axes) -> Weight:
    return Weight(shape, axes, stddev=shape[1] ** -0.5)


def _matrix(shape: tuple[int, ...], axes: Axes, inputs: int = 1) -> Weight:
    return Weight(shape, axes, stddev=math.prod(shape[:inputs]) ** -0.5, inputs=inputs)


def _scale(shape: tuple[int, ...], axes: Axes) -> Weight:
    """The scale of a norm, in float32: half precision would lose the one added to Gemma's."""
    return Weight(shape, axes, mean=1.0, wide=True)
