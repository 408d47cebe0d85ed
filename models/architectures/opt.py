"""OPT (arXiv 2205.01068), but its model of 350 million parameters."""

from __future__ import annotations

from models.architectures.declaration import Architecture, Fields, Key, activation
from models.layout import Layout

OPT = Architecture(
    class_name="OPTForCausalLM",
    models="OPT, but 350M",
    fields=Fields(
        intermediate_size=Key("ffn_dim"),
        norm="layer",
        norm_epsilon=1e-5,
        norm_before=True,
        norm_after=False,
        activation=Key("activation_function", "relu", activation),
        gated_mlp=False,
        tie_embeddings=Key("tie_word_embeddings", True),
        qkv_bias=Key("enable_bias", True),
        attention_out_bias=Key("enable_bias", True),
        mlp_bias=Key("enable_bias", True),
    ),
    rotary=None,
    must_be={
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": Key("hidden_size"),
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
)
