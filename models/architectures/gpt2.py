"""GPT-2 (Radford et al., Language Models are Unsupervised Multitask Learners, 2019)."""

from __future__ import annotations

from models.architectures.declaration import (
    Architecture,
    Fields,
    GGUFFormat,
    Key,
    activation,
)
from models.layout import Layout

GPT2 = Architecture(
    class_name="GPT2LMHeadModel",
    models="GPT-2, DistilGPT-2",
    fields=Fields(
        hidden_size=Key("n_embd"),
        intermediate_size=Key("n_inner", None),
        num_layers=Key("n_layer"),
        num_heads=Key("n_head"),
        num_kv_heads=Key("n_head"),
        head_dim=None,
        max_positions=Key("n_positions"),
        norm="layer",
        norm_epsilon=Key("layer_norm_epsilon", 1e-5),
        norm_before=True,
        norm_after=False,
        activation=Key("activation_function", "gelu_new", activation),
        gated_mlp=False,
        tie_embeddings=Key("tie_word_embeddings", True),
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
    ),
    rotary=None,
    must_be={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
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
    gguf=GGUFFormat(
        name="gpt2",
        layout=Layout(
            tensors={
                "token_embd": ("embedding",),
                "position_embd": ("position_embedding",),
                "blk.{}.attn_norm": ("attention_norm",),
                "blk.{}.attn_qkv": ("q", "k", "v"),
                "blk.{}.attn_output": ("attention_out",),
                "blk.{}.ffn_norm": ("mlp_norm",),
                "blk.{}.ffn_up": ("up",),
                "blk.{}.ffn_down": ("down",),
                "output_norm": ("final_norm",),
                "output": ("unembedding",),
            }
        ),
    ),
)
