"""Mistral (arXiv 2310.06825)."""

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

MISTRAL = Architecture(
    class_name="MistralForCausalLM",
    models="Mistral 7B, Nemo, Small",
    fields=Fields(
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=False,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", False),
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
    ),
    rotary=Rotary(theta=10_000.0),
    windows=Windows(default=4096),
    layout=LLAMA.layout,
    gguf=LLAMA.gguf,  # llama.cpp's converter calls it llama, too
)
