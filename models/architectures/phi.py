"""Phi-3 (arXiv 2404.14219) and Phi-4, whose checkpoints join projections of one input."""

from __future__ import annotations

from models.architectures.declaration import (
    Architecture,
    Fields,
    GGUFFormat,
    Key,
    Rotary,
    Scalings,
    Windows,
    activation,
)
from models.layout import Layout

PHI3 = Architecture(
    class_name="Phi3ForCausalLM",
    models="Phi-3 mini, medium; Phi-3.5 mini; Phi-4",
    fields=Fields(
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-5),
        norm_before=True,
        norm_after=False,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", False),
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
    ),
    rotary=Rotary(
        theta=10_000.0,
        scalings=Scalings(
            turns_part=True,
            original_positions=4096,
            names={
                "default": "default",
                "longrope": "longrope",
                "su": "longrope",
                "yarn": "longrope",
            },
        ),
    ),
    windows=Windows(),
    layout=Layout(
        tensors={
            "model.embed_tokens": ("embedding",),
            "model.layers.{}.input_layernorm": ("attention_norm",),
            "model.layers.{}.self_attn.qkv_proj": ("q", "k", "v"),
            "model.layers.{}.self_attn.o_proj": ("attention_out",),
            "model.layers.{}.post_attention_layernorm": ("mlp_norm",),
            "model.layers.{}.mlp.gate_up_proj": ("gate", "up"),
            "model.layers.{}.mlp.down_proj": ("down",),
            "model.norm": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="model.",
        ignored=(r".*rotary_emb\.inv_freq",),
    ),
    gguf=GGUFFormat(
        name="phi3",
        layout=Layout(
            tensors={
                "token_embd": ("embedding",),
                "blk.{}.attn_norm": ("attention_norm",),
                "blk.{}.attn_qkv": ("q", "k", "v"),
                "blk.{}.attn_output": ("attention_out",),
                "blk.{}.ffn_norm": ("mlp_norm",),
                "blk.{}.ffn_up": ("gate", "up"),
                "blk.{}.ffn_down": ("down",),
                "output_norm": ("final_norm",),
                "output": ("unembedding",),
            }
        ),
    ),
)
