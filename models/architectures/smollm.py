"""SmolLM3: Llama's layers, of which every fourth has no positions."""

from __future__ import annotations

from models.architectures.declaration import (
    Architecture,
    Fields,
    Key,
    Rotary,
    Windows,
    activation,
)
from models.architectures.llama import LLAMA

SMOLLM3 = Architecture(
    class_name="SmolLM3ForCausalLM",
    models="SmolLM3",
    fields=Fields(
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=False,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", True),
        qkv_bias=Key("attention_bias", False),
        attention_out_bias=Key("attention_bias", False),
        mlp_bias=Key("mlp_bias", False),
    ),
    rotary=Rotary(theta=2_000_000.0, nope_interval=4),
    windows=Windows(if_used=True, unless_rotating=True),
    layout=LLAMA.layout,
)
