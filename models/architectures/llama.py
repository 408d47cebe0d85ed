"""Llama (arXiv 2307.09288 and 2407.21783), and the models that are built as it is."""

from __future__ import annotations

from models.architectures.declaration import (
    Architecture,
    Fields,
    GGUFFormat,
    Key,
    Rotary,
    activation,
)
from models.layout import Layout

LLAMA = Architecture(
    class_name="LlamaForCausalLM",
    models="Llama 2, 3, 3.1, 3.2, 3.3; SmolLM2; TinyLlama",
    fields=Fields(
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=False,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", False),
        qkv_bias=Key("attention_bias", False),
        attention_out_bias=Key("attention_bias", False),
        mlp_bias=Key("mlp_bias", False),
    ),
    rotary=Rotary(theta=10_000.0),
    layout=Layout(
        tensors={
            "model.embed_tokens": ("embedding",),
            "model.layers.{}.input_layernorm": ("attention_norm",),
            "model.layers.{}.self_attn.q_proj": ("q",),
            "model.layers.{}.self_attn.k_proj": ("k",),
            "model.layers.{}.self_attn.v_proj": ("v",),
            "model.layers.{}.self_attn.o_proj": ("attention_out",),
            "model.layers.{}.post_attention_layernorm": ("mlp_norm",),
            "model.layers.{}.mlp.gate_proj": ("gate",),
            "model.layers.{}.mlp.up_proj": ("up",),
            "model.layers.{}.mlp.down_proj": ("down",),
            "model.norm": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="model.",
        ignored=(r".*rotary_emb\.inv_freq",),
    ),
    gguf=GGUFFormat(
        name="llama",
        layout=Layout(
            tensors={
                "token_embd": ("embedding",),
                "blk.{}.attn_norm": ("attention_norm",),
                "blk.{}.attn_q": ("q",),
                "blk.{}.attn_k": ("k",),
                "blk.{}.attn_v": ("v",),
                "blk.{}.attn_output": ("attention_out",),
                "blk.{}.ffn_norm": ("mlp_norm",),
                "blk.{}.ffn_gate": ("gate",),
                "blk.{}.ffn_up": ("up",),
                "blk.{}.ffn_down": ("down",),
                "output_norm": ("final_norm",),
                "output": ("unembedding",),
            },
            ignored=(r"rope_freqs\.weight",),  # read with the metadata
            interleaved=True,
        ),
    ),
)
