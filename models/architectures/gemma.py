"""Gemma 2 (arXiv 2408.00118) and Gemma 3 (arXiv 2503.19786), text only.

Their safetensors files hold the scales of norms less one; GGUF files hold them whole.
"""

from __future__ import annotations

import math

from models.architectures.declaration import (
    Architecture,
    Fields,
    GGUFFormat,
    Key,
    Rotary,
    Windows,
    activation,
)
from models.layout import Layout


def _inverse_root(scalar: float) -> float:
    return scalar**-0.5


GEMMA2 = Architecture(
    class_name="Gemma2ForCausalLM",
    models="Gemma 2",
    fields=Fields(
        head_dim=Key("head_dim", 256),
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=True,
        activation=Key("hidden_activation", "gelu_pytorch_tanh", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", True),
        qkv_bias=Key("attention_bias", False),
        attention_out_bias=Key("attention_bias", False),
        mlp_bias=False,
        attention_scale=Key("query_pre_attn_scalar", 256, _inverse_root),
        attention_softcap=Key("attn_logit_softcapping", 50.0, nullable=True),
        logit_softcap=Key("final_logit_softcapping", 30.0, nullable=True),
        embedding_scale=Key("hidden_size", convert=math.sqrt),
    ),
    rotary=Rotary(theta=10_000.0),
    windows=Windows(default=4096, pattern=2),
    must_be={"use_bidirectional_attention": False},
    layout=Layout(
        tensors={
            "model.embed_tokens": ("embedding",),
            "model.layers.{}.input_layernorm": ("attention_norm",),
            "model.layers.{}.self_attn.q_proj": ("q",),
            "model.layers.{}.self_attn.k_proj": ("k",),
            "model.layers.{}.self_attn.v_proj": ("v",),
            "model.layers.{}.self_attn.o_proj": ("attention_out",),
            "model.layers.{}.post_attention_layernorm": ("attention_post_norm",),
            "model.layers.{}.pre_feedforward_layernorm": ("mlp_norm",),
            "model.layers.{}.mlp.gate_proj": ("gate",),
            "model.layers.{}.mlp.up_proj": ("up",),
            "model.layers.{}.mlp.down_proj": ("down",),
            "model.layers.{}.post_feedforward_layernorm": ("mlp_post_norm",),
            "model.norm": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="model.",
        ignored=(r".*rotary_emb\.inv_freq",),
        norm_offset=1.0,
    ),
    gguf=GGUFFormat(
        name="gemma2",
        layout=Layout(
            tensors={
                "token_embd": ("embedding",),
                "blk.{}.attn_norm": ("attention_norm",),
                "blk.{}.attn_q": ("q",),
                "blk.{}.attn_k": ("k",),
                "blk.{}.attn_v": ("v",),
                "blk.{}.attn_output": ("attention_out",),
                "blk.{}.post_attention_norm": ("attention_post_norm",),
                "blk.{}.ffn_norm": ("mlp_norm",),
                "blk.{}.ffn_gate": ("gate",),
                "blk.{}.ffn_up": ("up",),
                "blk.{}.ffn_down": ("down",),
                "blk.{}.post_ffw_norm": ("mlp_post_norm",),
                "output_norm": ("final_norm",),
                "output": ("unembedding",),
            }
        ),
        unscaled_layers=46,  # Gemma 2 27B
    ),
)

GEMMA3 = Architecture(
    class_name="Gemma3ForCausalLM",
    models="Gemma 3, text only (270M, 1B)",
    fields=Fields(
        head_dim=Key("head_dim", 256),
        norm="rms",
        norm_epsilon=Key("rms_norm_eps", 1e-6),
        norm_before=True,
        norm_after=True,
        activation=Key("hidden_activation", "gelu_pytorch_tanh", activation),
        gated_mlp=True,
        tie_embeddings=Key("tie_word_embeddings", True),
        qkv_bias=Key("attention_bias", False),
        attention_out_bias=Key("attention_bias", False),
        mlp_bias=False,
        query_key_norm="head",
        attention_scale=Key("query_pre_attn_scalar", 256, _inverse_root),
        attention_softcap=Key("attn_logit_softcapping", None),
        logit_softcap=Key("final_logit_softcapping", None),
        embedding_scale=Key("hidden_size", convert=math.sqrt),
    ),
    rotary=Rotary(theta=1_000_000.0, local_theta=10_000.0),
    windows=Windows(default=4096, pattern=6),
    must_be={"use_bidirectional_attention": False},
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
            "model.layers.{}.post_attention_layernorm": ("attention_post_norm",),
            "model.layers.{}.pre_feedforward_layernorm": ("mlp_norm",),
            "model.layers.{}.mlp.gate_proj": ("gate",),
            "model.layers.{}.mlp.up_proj": ("up",),
            "model.layers.{}.mlp.down_proj": ("down",),
            "model.layers.{}.post_feedforward_layernorm": ("mlp_post_norm",),
            "model.norm": ("final_norm",),
            "lm_head": ("unembedding",),
        },
        prefix="model.",
        ignored=(r".*rotary_emb\.inv_freq",),
        norm_offset=1.0,
    ),
    gguf=GGUFFormat(
        name="gemma3",
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
                "blk.{}.post_attention_norm": ("attention_post_norm",),
                "blk.{}.ffn_norm": ("mlp_norm",),
                "blk.{}.ffn_gate": ("gate",),
                "blk.{}.ffn_up": ("up",),
                "blk.{}.ffn_down": ("down",),
                "blk.{}.post_ffw_norm": ("mlp_post_norm",),
                "output_norm": ("final_norm",),
                "output": ("unembedding",),
            }
        ),
        unscaled_layers=62,  # Gemma 3 27B
    ),
)
