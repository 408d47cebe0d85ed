"""The configuration of a decoder."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jax_chunkattn.device.model_interface import CacheSpec
from models.rope import LayerRopes, Rope, RotaryTables
from pallas_kernels.windows import Window, WindowMap

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Norm = Literal["rms", "layer"]
QueryKeyNorm = Literal["head", "projection"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that defines a decoder except its weights and their dtype.

    It is hashable, so it can be a static argument. The defaults are Llama's. Raises ValueError when
    a field, or a combination of two, is invalid.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_layers: V, E, the width of the MLP, L.
      num_heads, num_kv_heads, head_dim: Hq, Hkv, D.
      max_positions: the most tokens of a sequence.
      tie_embeddings: whether the embedding is the unembedding too.
      norm: "rms" (Zhang and Sennrich, arXiv 1910.07467), or "layer", which has a bias.
      norm_epsilon: added to the mean square, or the variance.
      norm_before, norm_after: what each layer's attention and MLP read, and what they add to the
        residual stream, is normalised. OLMo 2 (arXiv 2501.00656) norms after, Gemma 2 both.
      query_key_norm: RMS norm of queries and keys before rotation: over each "head" (Qwen3), or
        over all heads together ("projection", OLMo 2).
      activation: of the MLP, or of its gate.
      gated_mlp: activation(gate) * up (SwiGLU, arXiv 2002.05202) rather than activation(up).
      qkv_bias, attention_out_bias, mlp_bias: which projections add a bias.
      rope: rotary embedding of all layers, or one for each layer; None: no layer rotates.
      learned_positions: whether an embedding of positions is added to that of tokens.
      attention_scale: multiplies attention's scores; None is 1/sqrt(D).
      attention_softcap, logit_softcap: x becomes cap * tanh(x / cap), for scores and for logits
        (Gemma 2, arXiv 2408.00118, section 2).
      embedding_scale: multiplies embeddings.
      sliding_window: how many tokens a query sees, itself among them: in all layers, or in each
        (Mistral 7B, arXiv 2310.06825, section 2); None: all that are before it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    tie_embeddings: bool = False
    norm: Norm = "rms"
    norm_epsilon: float = 1e-5
    norm_before: bool = True
    norm_after: bool = False
    query_key_norm: QueryKeyNorm | None = None
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    rope: Rope | LayerRopes | None = Rope()
    learned_positions: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float | None = None
    sliding_window: int | tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        _check_values(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads}): each KV head serves the same number of query heads"
            )
        if isinstance(self.rope, tuple) and len(self.rope) != self.num_layers:
            raise ValueError(f"{len(self.rope)} ropes for {self.num_layers} layers")
        if len(self.layer_windows) != self.num_layers:
            raise ValueError(f"{len(self.layer_windows)} windows for {self.num_layers} layers")
        for rope in self.layer_ropes:
            if rope is not None and (
                self.head_dim % 2 or not 2 <= rope.turning(self.head_dim) <= self.head_dim
            ):
                raise ValueError(
                    f"of a head_dim of {self.head_dim}, {rope.turning(self.head_dim)} cannot rotate"
                )

    @property
    def layer_ropes(self) -> LayerRopes:
        """The rotary embedding of each layer."""
        return self.rope if isinstance(self.rope, tuple) else (self.rope,) * self.num_layers

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        windows = self.sliding_window
        return windows if isinstance(windows, tuple) else (windows,) * self.num_layers

    @property
    def rotary_tables(self) -> RotaryTables | None:
        return RotaryTables.of(self.layer_ropes, self.head_dim)

    @property
    def cache_spec(self) -> CacheSpec:
        return CacheSpec(
            self.num_layers,
            self.num_kv_heads,
            self.head_dim,
            self.num_heads,
            scale=self.attention_scale,
            softcap=self.attention_softcap,
            windows=WindowMap.of_layers(
                [Window(size) if size is not None else None for size in self.layer_windows],
                self.num_kv_heads,
            ),
        )


@functools.cache
def field_kinds() -> dict[str, tuple[Any, ...]]:
    """The types that each field of `DecoderConfig` is declared with."""
    return {
        name: (declared,) if get_origin(declared) is Literal else get_args(declared) or (declared,)
        for name, declared in get_type_hints(DecoderConfig).items()
    }


def _check_values(config: DecoderConfig) -> None:
    """Raises ValueError for a field of another type than declared, or a number not above 0."""
    for name, value in vars(config).items():
        kinds = field_kinds()[name]
        if name == "sliding_window" and isinstance(value, tuple):
            wrong = [one for one in value if one is not None and not _is_positive(one, (int,))]
            if wrong:
                raise ValueError(f"{name} must be positive integers, got {wrong[0]!r}")
            continue
        if name == "rope" or (value is None and type(None) in kinds):
            continue
        choices: tuple[Any, ...] = _choices(kinds)
        if choices:
            wanted, good = f"one of {', '.join(choices)}", value in choices
        elif bool in kinds:
            wanted, good = "true or false", isinstance(value, bool)
        else:
            numbers = (int, float) if float in kinds else (int,)
            wanted = "a positive number" if float in kinds else "a positive integer"
            good = _is_positive(value, numbers)
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_positive(value: Any, numbers: tuple[type, ...]) -> bool:
    is_number = isinstance(value, numbers) and not isinstance(value, bool)
    return is_number and 0 < value < math.inf


def _choices(kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """The strings that a declared type allows; empty for any other type."""
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
