"""OLMo 2 (arXiv 2501.00656): norms of what attention and the MLP add, and not of what they read."""

from __future__ import annotations

from models.architectures.declaration import (
    Architecture,
    Fields,
    Key,
    Rotary,
    activation,
)
from models.layout import Layout

OLMO2 = Architecture(
    class_name="Olmo2ForCausalLM",
    models="OLMo 2",
    fields=Fields(
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-5),
        norm_before=False,
        norm_after=True,
        activation=Key("hidden_act", "silu", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", False),
        qkv_bias=Key("attention_bias", False),
        attention_out_bias=Key("attention_bias", False),
        mlp_bias=False,
        query_key_norm="projection",
    ),
    rotary=Rotary(theta=10_000.0),
    layout=Layout(
        tensors={
            "model.embed_tokens": ("embedding",),
            "model.layers.{}.self_attn.q_proj": ("q",),
            "model.layers.{}.self_attn.k_proj": ("k",),
            "model.layers.{}.self_attn.v_proj": ("v",),
            "model.layers.{}.self_attn.q_norm": ("query_norm",),
            "model.layers.{}.self_attn.k_norm": ("key_norm",),
            "model.layers.{}.self_attn.o_proj": ("attention_out",),
            "model.layers.{}.post_attention_layernorm": ("attention_post_norm",),
            "model.layers.{}.mlp.gate_proj": ("gate",),
            "model.layers.{}.mlp.up_proj": ("up",),
            "model.layers.{}.mlp.down_proj": ("down",),
            "model.layers.{}.post_feedforward_layernorm": ("mlp_post_norm",),
            "model.norm": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="model.",
        ignored=(r".*rotary_emb\.inv_freq",),
    ),
)
