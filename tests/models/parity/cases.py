"""Tiny checkpoints of every architecture, as data: the config.json values of each case.

Values are chosen so that whatever makes an architecture different is large enough to be missed: a
cap that caps, a scale that is not 1/sqrt(D), heads that are not hidden_size wide, a scaled rotary
embedding whose original context the prompts go beyond.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 96
EPSILON = 2.0**-10
"""Of norms: large enough to be missed, and a float32, as GGUF files store it. A case that both
formats have is then one config, and compiled once."""
SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": EPSILON,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ORIGINAL = 16
"""The context that scaled rotary embeddings were made for: shorter than the prompts."""
WINDOW = 6
"""Tokens that a query sees in layers with windows: a quarter of a prompt, less than a chunk."""
_LAST_LAYER_WINDOWED = {
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 1,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **values}}


@dataclass(frozen=True)
class Case:
    """One checkpoint.

    Attributes:
      class_name: the architecture.
      config: of transformers' config class, beyond its defaults.
      max_positions: to load it with.
      shards: files that the weights are spread over.
      bare: saved without its head, as the base model, whose tensors lack the prefix.
    """

    class_name: str
    config: dict[str, Any] = field(default_factory=dict)
    max_positions: int | None = None
    shards: int = 1
    bare: bool = False


CASES: dict[str, Case] = {
    "llama": Case("LlamaForCausalLM", SMALL, shards=3),
    "llama-tied-biased": Case(
        "LlamaForCausalLM",
        SMALL
        | {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
            "num_key_value_heads": 4,
        },
    ),
    "llama3-rope": Case(
        "LlamaForCausalLM",
        SMALL
        | _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=ORIGINAL,
        ),
    ),
    "linear-rope": Case("LlamaForCausalLM", SMALL | _rope("linear", factor=4.0)),
    "dynamic-rope": Case("LlamaForCausalLM", SMALL | _rope("dynamic", factor=4.0)),
    "yarn-rope": Case(
        "LlamaForCausalLM",
        SMALL | _rope("yarn", factor=8.0, original_max_position_embeddings=ORIGINAL),
    ),
    "mistral": Case("MistralForCausalLM", SMALL | {"sliding_window": WINDOW, "head_dim": 16}),
    "mistral-full": Case("MistralForCausalLM", SMALL | {"sliding_window": None, "head_dim": 16}),
    "qwen2": Case("Qwen2ForCausalLM", SMALL),
    "qwen2-windows": Case("Qwen2ForCausalLM", SMALL | _LAST_LAYER_WINDOWED),
    "qwen3": Case("Qwen3ForCausalLM", SMALL | {"head_dim": 16}),
    "qwen3-windows": Case("Qwen3ForCausalLM", SMALL | {"head_dim": 16} | _LAST_LAYER_WINDOWED),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        SMALL
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 4,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "sliding_window": WINDOW,
        },
    ),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        SMALL
        | {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "query_pre_attn_scalar": 4,
            "sliding_window": WINDOW,
            "layer_types": [*["sliding_attention"] * 2, "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            },
        },
    ),
    "phi3": Case(
        "Phi3ForCausalLM",
        SMALL
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "phi3-windows": Case("Phi3ForCausalLM", SMALL | {"sliding_window": WINDOW}),
    "phi3-longrope": Case(
        "Phi3ForCausalLM",
        SMALL
        | {"original_max_position_embeddings": 100}
        | {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
                "original_max_position_embeddings": 100,
            }
        },
        max_positions=100,
    ),
    "olmo2": Case("Olmo2ForCausalLM", SMALL),
    "smollm3": Case(
        "SmolLM3ForCausalLM", SMALL | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
    ),
    "smollm3-windows": Case(
        "SmolLM3ForCausalLM",
        SMALL
        | {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}
        | {"use_sliding_window": True, "sliding_window": WINDOW},
    ),
    "opt": Case(
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "word_embed_proj_dim": 48,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "gpt2": Case(
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 1024,
            "layer_norm_epsilon": EPSILON,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        bare=True,
    ),
}

SHARED = [5, 17, 60, 33, 8, 71, 90, 12, 44, 3, 29, 29, 81, 7, 66, 52, 19]
PROMPTS = ([*SHARED, 40, 77, 9, 23, 58, 61, 30], [*SHARED, 85, 11, 36, 94, 2 + 70])
"""They share two chunks of `CHUNK_SIZE`, and a token."""
CHUNK_SIZE = 8
GREEDY_TOKENS = 32
LOGIT_TOLERANCE = 1e-4
