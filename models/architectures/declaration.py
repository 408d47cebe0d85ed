"""What an architecture's declaration consists of.

Keys and tensor names are those of transformers' checkpoints. `DecoderConfig` explains the fields,
and names the papers that they come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.config import Activation, Norm, QueryKeyNorm
from models.layout import Layout

REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """The value of a field: that of a key of config.json, converted.

    An absent key has the default, and so has one that is null, unless it is `nullable`. Where the
    default is None, `models.hf_config` derives the value from other fields, or leaves it None.
    """

    name: str
    default: Any = REQUIRED
    convert: Callable[[Any], Any] | None = None
    nullable: bool = False


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def activation(name: str) -> Activation:
    """The activation that config.json calls `name`. Raises KeyError for an unknown one."""
    return ACTIVATIONS[name]


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where the fields of `DecoderConfig` come from, in the order in which they are read.

    Each is a `Key` of config.json, or a value that is the same in all checkpoints. The defaults of
    sizes are the keys that most architectures use. What a layer computes has no default, except the
    last five fields, which few architectures have.
    """

    vocab_size: Key = Key("vocab_size")
    hidden_size: Key = Key("hidden_size")
    intermediate_size: Key = Key("intermediate_size")
    num_layers: Key = Key("num_hidden_layers")
    num_heads: Key = Key("num_attention_heads")
    num_kv_heads: Key = Key("num_key_value_heads", None)
    head_dim: Key | None = Key("head_dim", None)
    max_positions: Key = Key("max_position_embeddings")
    norm: Norm
    norm_epsilon: Key | float
    norm_before: bool
    norm_after: bool
    activation: Key
    gated_mlp: bool
    tie_embeddings: Key
    qkv_bias: Key | bool
    attention_out_bias: Key | bool
    mlp_bias: Key | bool
    query_key_norm: QueryKeyNorm | None = None
    attention_scale: Key | None = None
    attention_softcap: Key | None = None
    logit_softcap: Key | None = None
    embedding_scale: Key | None = None

    def by_name(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Scalings:
    """How an architecture reads the keys of config.json that scale rotary embedding.

    Attributes:
      turns_part: whether `partial_rotary_factor` is used; otherwise whole heads rotate.
      original_positions: the default of `original_max_position_embeddings`; None: the scaling's
        own, or as many as the model has.
      names: the supported scalings, by the names that config.json gives them; None: all of them, by
        their own names.
    """

    turns_part: bool = False
    original_positions: int | None = None
    names: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary embedding of positions.

    Attributes:
      theta: the base where config.json has none.
      local_theta: that of layers with a window, where they have their own.
      nope_interval: layers `interval - 1`, `2 interval - 1`, ... do not rotate, unless config.json
        says which; None: all layers rotate.
      scalings: which scalings there are, and how they are read.
    """

    theta: float
    local_theta: float | None = None
    nope_interval: int | None = None
    scalings: Scalings = Scalings()


@dataclass(frozen=True)
class Windows:
    """Layers that see the last `sliding_window` tokens only.

    Attributes:
      default: the window where config.json has no such key.
      pattern: layers `pattern - 1`, `2 pattern - 1`, ... see all tokens; None: no layer does.
      if_used: only where `use_sliding_window` is true.
      first: of the layers with one, where config.json has no `max_window_layers`.
      unless_rotating: only layers whose queries and keys are not rotated.
    """

    default: int | None = None
    pattern: int | None = None
    if_used: bool = False
    first: int = 0
    unless_rotating: bool = False


@dataclass(frozen=True, kw_only=True)
class GGUFFormat:
    """An architecture in GGUF files, with llama.cpp's names for metadata and tensors.

    Attributes:
      name: what the files call the architecture.
      layout: of the files' tensors.
      unscaled_layers: the number of layers of the one model whose scores are not scaled by
        1/sqrt(head_dim) but by 1/sqrt(hidden_size / num_heads). The file does not say so;
        llama.cpp recognises the model by its number of layers.
    """

    name: str
    layout: Layout
    unscaled_layers: int | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One architecture.

    Attributes:
      class_name: what a checkpoint's config.json calls it (`architectures`).
      models: some that have it.
      fields: what its decoder computes.
      rotary: its rotary embedding; None: positions are learned.
      windows: which layers have sliding windows; None: none has, whatever config.json says.
      must_be: keys, and the only value of each that is supported, or the key whose value it must
        equal; an absent key is accepted.
      layout: of its checkpoints' tensors.
      gguf: its GGUF files; None: they are not supported.
    """

    class_name: str
    models: str
    fields: Fields
    rotary: Rotary | None
    windows: Windows | None = None
    must_be: Mapping[str, Any] = field(default_factory=dict)
    layout: Layout
    gguf: GGUFFormat | None = None
