"""The architectures that load, each as what tells it from Llama.

`class_name` is what a checkpoint's config.json calls it (`architectures`). Keys and tensor names
are those of transformers' checkpoints; the papers are named in `DecoderConfig`, where the
differences are explained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models.layout import Layout

REQUIRED: Any = object()


@dataclass(frozen=True)
class Key:
    """The value of a field: that of a key of config.json, converted.

    A key that is absent has the default, and so has null unless it is `nullable`. A default of None
    is left to the reader of config.json, which knows what follows from other fields.
    """

    name: str
    default: Any = REQUIRED
    convert: Callable[[Any], Any] | None = None
    nullable: bool = False


@dataclass(frozen=True)
class Windows:
    """Layers that see the last `sliding_window` tokens only.

    Attributes:
      default: the window where config.json has no such key.
      pattern: layers `pattern - 1`, `2 pattern - 1`, ... see all tokens; None: no layer does.
      if_used: only where `use_sliding_window` is true.
    """

    default: int | None = None
    pattern: int | None = None
    if_used: bool = False


@dataclass(frozen=True)
class Scalings:
    """How an architecture reads rotary embedding's keys of config.json, where not as Llama.

    Attributes:
      turns_part: whether `partial_rotary_factor` counts; heads of others turn whole, whatever it
        says.
      original_positions: `original_max_position_embeddings` where config.json has none; None: as
        many as the model has, or what stands beside the scaling.
      names: the scalings that it has, by the names that mean them; None is all, by their own.
    """

    turns_part: bool = False
    original_positions: int | None = None
    names: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
      class_name: by which a checkpoint names it.
      models: some that have it.
      fields: of `DecoderConfig`: a `Key`, or the value itself.
      layout: of its checkpoints' tensors.
      rotates: whether positions are told by rotary embedding.
      theta, local_theta: the base where config.json has none, and that of layers with a window.
      scalings: which scalings of rotary embedding it has, and how they are read.
      nope_interval: layers `interval - 1`, `2 interval - 1`, ... do not rotate, unless config.json
        says which.
      windows: what it does with sliding windows.
      must_be: keys whose other values ask for what is not supported, or the keys that they must
        equal; absent is as good.
    """

    class_name: str
    models: str
    fields: dict[str, Any]
    layout: Layout
    rotates: bool = True
    theta: float = 10_000.0
    local_theta: float | None = None
    scalings: Scalings = Scalings()
    nope_interval: int | None = None
    windows: Windows = Windows(if_used=True)
    must_be: Mapping[str, Any] = field(default_factory=dict)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_FIELDS = {
    "vocab_size": Key("vocab_size"),
    "hidden_size": Key("hidden_size"),
    "intermediate_size": Key("intermediate_size"),
    "num_layers": Key("num_hidden_layers"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", None),
    "head_dim": Key("head_dim", None),
    "max_positions": Key("max_position_embeddings"),
    "norm_epsilon": Key("rms_norm_eps", 1e-6),
    "activation": Key("hidden_act", "silu", ACTIVATIONS.__getitem__),
    "tie_embeddings": Key("tie_word_embeddings", False),
}
_ATTENTION_BIAS = {
    "qkv_bias": Key("attention_bias", False),
    "attention_out_bias": Key("attention_bias", False),
}
_ATTENTION = {
    "model.layers.{}.self_attn.q_proj": ("q",),
    "model.layers.{}.self_attn.k_proj": ("k",),
    "model.layers.{}.self_attn.v_proj": ("v",),
    "model.layers.{}.self_attn.o_proj": ("attention_out",),
}
_MLP = {
    "model.layers.{}.mlp.gate_proj": ("gate",),
    "model.layers.{}.mlp.up_proj": ("up",),
    "model.layers.{}.mlp.down_proj": ("down",),
}
_ENDS = {
    "model.embed_tokens": ("embedding",),
    "model.norm": ("final_norm",),
    "lm_head": ("unembedding",),
}
_NORMS_BEFORE = {
    "model.layers.{}.input_layernorm": ("attention_norm",),
    "model.layers.{}.post_attention_layernorm": ("mlp_norm",),
}
_NORMS_AFTER = {
    "model.layers.{}.post_attention_layernorm": ("attention_post_norm",),
    "model.layers.{}.post_feedforward_layernorm": ("mlp_post_norm",),
}
_QUERY_KEY_NORMS = {
    "model.layers.{}.self_attn.q_norm": ("query_norm",),
    "model.layers.{}.self_attn.k_norm": ("key_norm",),
}
_LAYOUT = Layout(
    tensors=_ENDS | _NORMS_BEFORE | _ATTENTION | _MLP,
    prefix="model.",
    ignored=(r".*rotary_emb\.inv_freq",),
)

LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    models="Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama",
    fields=_FIELDS | _ATTENTION_BIAS | {"mlp_bias": Key("mlp_bias", False)},
    layout=_LAYOUT,
    windows=Windows(),
)
MISTRAL = Architecture(
    class_name="MistralForCausalLM",
    models="Mistral 7B from v0.2 on, Nemo, Small",
    fields=_FIELDS,
    layout=_LAYOUT,
    windows=Windows(default=4096),
)
QWEN2 = Architecture(
    class_name="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5",
    fields=_FIELDS | {"qkv_bias": True},
    layout=_LAYOUT,
)
QWEN3 = Architecture(
    class_name="Qwen3ForCausalLM",
    models="Qwen3, but its mixtures of experts",
    fields=_FIELDS | _ATTENTION_BIAS | {"head_dim": Key("head_dim", 128), "query_key_norm": "head"},
    layout=replace(_LAYOUT, tensors=_LAYOUT.tensors | _QUERY_KEY_NORMS),
)
GEMMA2 = Architecture(
    class_name="Gemma2ForCausalLM",
    models="Gemma 2",
    fields=_FIELDS
    | _ATTENTION_BIAS
    | {
        "head_dim": Key("head_dim", 256),
        "tie_embeddings": Key("tie_word_embeddings", True),
        "norm_after": True,
        "activation": Key("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS.__getitem__),
        "attention_scale": Key("query_pre_attn_scalar", 256, lambda scalar: scalar**-0.5),
        "attention_softcap": Key("attn_logit_softcapping", 50.0, nullable=True),
        "logit_softcap": Key("final_logit_softcapping", 30.0, nullable=True),
        "embedding_scale": Key("hidden_size", REQUIRED, math.sqrt),
    },
    layout=Layout(
        tensors=_ENDS
        | _ATTENTION
        | _MLP
        | _NORMS_AFTER
        | {
            "model.layers.{}.input_layernorm": ("attention_norm",),
            "model.layers.{}.pre_feedforward_layernorm": ("mlp_norm",),
        },
        prefix="model.",
        ignored=_LAYOUT.ignored,
        norm_offset=1.0,
    ),
    windows=Windows(default=4096, pattern=2),
    must_be={"use_bidirectional_attention": False},
)
GEMMA3 = replace(
    GEMMA2,
    class_name="Gemma3ForCausalLM",
    models="Gemma 3, text only (270M, 1B)",
    fields=GEMMA2.fields
    | {
        "query_key_norm": "head",
        "attention_softcap": Key("attn_logit_softcapping", None),
        "logit_softcap": Key("final_logit_softcapping", None),
    },
    layout=replace(GEMMA2.layout, tensors=GEMMA2.layout.tensors | _QUERY_KEY_NORMS),
    theta=1_000_000.0,
    local_theta=10_000.0,
    windows=Windows(default=4096, pattern=6),
)
PHI3 = Architecture(
    class_name="Phi3ForCausalLM",
    models="Phi-3 mini, medium; Phi-3.5 mini; Phi-4",
    fields=_FIELDS | {"norm_epsilon": Key("rms_norm_eps", 1e-5)},
    layout=replace(
        _LAYOUT,
        tensors=_ENDS
        | _NORMS_BEFORE
        | {
            "model.layers.{}.self_attn.qkv_proj": ("q", "k", "v"),
            "model.layers.{}.self_attn.o_proj": ("attention_out",),
            "model.layers.{}.mlp.gate_up_proj": ("gate", "up"),
            "model.layers.{}.mlp.down_proj": ("down",),
        },
    ),
    scalings=Scalings(
        turns_part=True,
        original_positions=4096,
        names={"default": "default"} | dict.fromkeys(("longrope", "su", "yarn"), "longrope"),
    ),
    windows=Windows(),
)
OLMO2 = Architecture(
    class_name="Olmo2ForCausalLM",
    models="OLMo 2",
    fields=_FIELDS
    | _ATTENTION_BIAS
    | {
        "norm_epsilon": Key("rms_norm_eps", 1e-5),
        "norm_before": False,
        "norm_after": True,
        "query_key_norm": "projection",
    },
    layout=replace(_LAYOUT, tensors=_ENDS | _ATTENTION | _MLP | _NORMS_AFTER | _QUERY_KEY_NORMS),
    windows=Windows(),
)
SMOLLM3 = replace(
    LLAMA,
    class_name="SmolLM3ForCausalLM",
    models="SmolLM3",
    fields=LLAMA.fields | {"tie_embeddings": Key("tie_word_embeddings", True)},
    theta=2_000_000.0,
    nope_interval=4,
    windows=Windows(if_used=True),
)
OPT = Architecture(
    class_name="OPTForCausalLM",
    models="OPT, but 350M",
    fields=_FIELDS
    | {
        "intermediate_size": Key("ffn_dim"),
        "norm": "layer",
        "norm_epsilon": 1e-5,
        "activation": Key("activation_function", "relu", ACTIVATIONS.__getitem__),
        "gated_mlp": False,
        "rope": None,
        "learned_positions": True,
        "tie_embeddings": Key("tie_word_embeddings", True),
        **dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias"), Key("enable_bias", True)),
    },
    layout=Layout(
        tensors={
            "model.decoder.embed_tokens": ("embedding",),
            "model.decoder.embed_positions": ("position_embedding",),
            "model.decoder.layers.{}.self_attn_layer_norm": ("attention_norm",),
            "model.decoder.layers.{}.self_attn.q_proj": ("q",),
            "model.decoder.layers.{}.self_attn.k_proj": ("k",),
            "model.decoder.layers.{}.self_attn.v_proj": ("v",),
            "model.decoder.layers.{}.self_attn.out_proj": ("attention_out",),
            "model.decoder.layers.{}.final_layer_norm": ("mlp_norm",),
            "model.decoder.layers.{}.fc1": ("up",),
            "model.decoder.layers.{}.fc2": ("down",),
            "model.decoder.final_layer_norm": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="model.",
        position_offset=2,
    ),
    rotates=False,
    windows=Windows(),
    must_be={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": Key("hidden_size"),
    },
)
GPT2 = Architecture(
    class_name="GPT2LMHeadModel",
    models="GPT-2, DistilGPT-2",
    fields={
        "vocab_size": Key("vocab_size"),
        "hidden_size": Key("n_embd"),
        "intermediate_size": Key("n_inner", None),
        "num_layers": Key("n_layer"),
        "num_heads": Key("n_head"),
        "num_kv_heads": Key("n_head"),
        "head_dim": None,
        "max_positions": Key("n_positions"),
        "norm": "layer",
        "norm_epsilon": Key("layer_norm_epsilon", 1e-5),
        "activation": Key("activation_function", "gelu_new", ACTIVATIONS.__getitem__),
        "gated_mlp": False,
        "rope": None,
        "learned_positions": True,
        "tie_embeddings": Key("tie_word_embeddings", True),
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    layout=Layout(
        tensors={
            "transformer.wte": ("embedding",),
            "transformer.wpe": ("position_embedding",),
            "transformer.h.{}.ln_1": ("attention_norm",),
            "transformer.h.{}.attn.c_attn": ("q", "k", "v"),
            "transformer.h.{}.attn.c_proj": ("attention_out",),
            "transformer.h.{}.ln_2": ("mlp_norm",),
            "transformer.h.{}.mlp.c_fc": ("up",),
            "transformer.h.{}.mlp.c_proj": ("down",),
            "transformer.ln_f": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="transformer.",
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        input_first=True,
    ),
    rotates=False,
    windows=Windows(),
    must_be={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
)

ARCHITECTURES: dict[str, Architecture] = {
    architecture.class_name: architecture
    for architecture in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        PHI3,
        OLMO2,
        SMOLLM3,
        OPT,
        GPT2,
    )
}
"""By class name."""
