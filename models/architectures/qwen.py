"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388), without their mixtures of experts."""

from __future__ import annotations

from models.architectures.declaration import (
    Architecture,
    Fields,
    GGUFFormat,
    Key,
    Rotary,
    Windows,
    activation,
)
from models.architectures.llama import LLAMA
from models.layout import Layout

QWEN2 = Architecture(
    class_name="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5",
    fields=Fields(
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=False,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", False),
        qkv_bias=True,
        attention_out_bias=False,
        mlp_bias=False,
    ),
    rotary=Rotary(theta=10_000.0),
    windows=Windows(default=4096, if_used=True, first=28),
    layout=LLAMA.layout,
    gguf=GGUFFormat(
        name="qwen2",
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
            }
        ),
    ),
)

QWEN3 = Architecture(
    class_name="Qwen3ForCausalLM",
    models="Qwen3, but its mixtures of experts",
    fields=Fields(
        head_dim=Key("head_dim", 128),
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=False,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", False),
        qkv_bias=Key("attention_bias", False),
        attention_out_bias=Key("attention_bias", False),
        mlp_bias=False,
        query_key_norm="head",
    ),
    rotary=Rotary(theta=10_000.0),
    windows=Windows(default=4096, if_used=True, first=28),
    layout=Layout(
        tensors={
            "model.embed_tokens": ("embedding",),
            "model.layers.{}.input_layernorm": ("attention_norm",),
            "model.layers.{}.self_attn.q_proj": ("q",),
            "model.layers.{}.self_attn.k_proj": ("k",),
            "model.layers.{}.self_attn.v_proj": ("v",),
            "model.layers.{}.self_attn.q_norm": ("query_norm",),
            "model.layers.{}.self_attn.k_norm": ("key_norm",),
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
        name="qwen3",
        layout=Layout(
            tensors={
                "token_embd": ("embedding",),
                "blk.{}.attn_norm": ("attention_norm",),
                "blk.{}.attn_q": ("q",),
                "blk.{}.attn_k": ("k",),
                "blk.{}.attn_v": ("v",),
                "blk.{}.attn_q_norm": ("query_norm",),
                "blk.{}.attn_k_norm": ("key_norm",),
                "blk.{}.attn_output": ("attention_out",),
                "blk.{}.ffn_norm": ("mlp_norm",),
                "blk.{}.ffn_gate": ("gate",),
                "blk.{}.ffn_up": ("up",),
                "blk.{}.ffn_down": ("down",),
                "output_norm": ("final_norm",),
                "output": ("unembedding",),
            }
        ),
    ),
)
