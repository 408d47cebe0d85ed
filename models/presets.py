"""Published shapes by name, for random or abstract weights.

The numbers are those of each model's config.json on the Hugging Face hub. `tiny` and `small` are
not published models: they are for tests, and for measuring on a CPU with long prompts.
"""

from __future__ import annotations

import difflib
from dataclasses import replace

from models.config import DecoderConfig
from models.rope import Llama3Scaling, Rope

_LLAMA_3 = DecoderConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rope=Rope(500_000.0),
    max_positions=8192,
)
_LLAMA_3_1 = replace(
    _LLAMA_3, rope=Rope(500_000.0, Llama3Scaling(8.0, 1.0, 4.0, 8192)), max_positions=131_072
)
_LLAMA_3_2 = replace(
    _LLAMA_3_1, rope=Rope(500_000.0, Llama3Scaling(32.0, 1.0, 4.0, 8192)), tie_embeddings=True
)
_LLAMA_2 = DecoderConfig(
    vocab_size=32_000,
    hidden_size=4096,
    intermediate_size=11_008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=4096,
)
_QWEN_2_5 = DecoderConfig(  # the Instruct models'; the 7B base model has 131,072 positions
    vocab_size=152_064,
    hidden_size=3584,
    intermediate_size=18_944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    norm_epsilon=1e-6,
    qkv_bias=True,
    rope=Rope(1_000_000.0),
    max_positions=32_768,
)
_QWEN_3 = DecoderConfig(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_epsilon=1e-6,
    query_key_norm="head",
    rope=Rope(1_000_000.0),
    max_positions=40_960,
)
_OPT = DecoderConfig(
    vocab_size=50_272,
    hidden_size=4096,
    intermediate_size=16_384,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_positions=2048,
    tie_embeddings=True,
    norm="layer",
    activation="relu",
    gated_mlp=False,
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    rope=None,
    learned_positions=True,
)

PRESETS: dict[str, DecoderConfig] = {
    "tiny": DecoderConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_positions=1024,
        tie_embeddings=True,
    ),
    "small": DecoderConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=64,
        max_positions=32_768,
        tie_embeddings=True,
    ),
    "smollm2-135m": DecoderConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope=Rope(100_000.0),
        max_positions=8192,
        tie_embeddings=True,
    ),
    "smollm3-3b": DecoderConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=11_008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=4,
        head_dim=128,
        norm_epsilon=1e-6,
        rope=(*(Rope(5_000_000.0),) * 3, None) * 9,
        max_positions=65_536,
        tie_embeddings=True,
    ),
    "gpt2": replace(
        _OPT,
        vocab_size=50_257,
        hidden_size=768,
        intermediate_size=3072,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_positions=1024,
        activation="gelu_tanh",
    ),
    "opt-6.7b": _OPT,
    "llama-2-7b": _LLAMA_2,
    "llama-3-8b": _LLAMA_3,
    "llama-3.1-8b": _LLAMA_3_1,
    "llama-3.1-70b": replace(
        _LLAMA_3_1, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    ),
    "llama-3.2-1b": replace(
        _LLAMA_3_2, hidden_size=2048, intermediate_size=8192, num_layers=16, head_dim=64
    ),
    "llama-3.2-3b": replace(
        _LLAMA_3_2, hidden_size=3072, intermediate_size=8192, num_layers=28, num_heads=24
    ),
    "mistral-7b-v0.3": replace(
        _LLAMA_3, vocab_size=32_768, rope=Rope(1_000_000.0), max_positions=32_768
    ),
    "qwen2.5-7b": _QWEN_2_5,
    "qwen2.5-0.5b": replace(
        _QWEN_2_5,
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        tie_embeddings=True,
    ),
    "qwen3-8b": _QWEN_3,
    "qwen3-0.6b": replace(
        _QWEN_3,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        tie_embeddings=True,
    ),
    "gemma-2-2b": DecoderConfig(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_layers=26,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        max_positions=8192,
        sliding_window=(4096, None) * 13,
        tie_embeddings=True,
        norm_epsilon=1e-6,
        norm_after=True,
        activation="gelu_tanh",
        attention_scale=256**-0.5,
        attention_softcap=50.0,
        logit_softcap=30.0,
        embedding_scale=2304**0.5,
    ),
    "phi-3-mini-4k": DecoderConfig(
        vocab_size=32_064,
        hidden_size=3072,
        intermediate_size=8192,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=96,
        max_positions=4096,
        sliding_window=(2047,) * 32,
    ),
    "olmo-2-7b": DecoderConfig(
        vocab_size=100_352,
        hidden_size=4096,
        intermediate_size=11_008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        norm_epsilon=1e-6,
        norm_before=False,
        norm_after=True,
        query_key_norm="projection",
        rope=Rope(500_000.0),
        max_positions=4096,
    ),
}


def preset(name: str) -> DecoderConfig:
    """The config called `name`; an unknown name is a ValueError that lists the known ones."""
    if name in PRESETS:
        return PRESETS[name]
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown preset {name!r}{hint}; known presets: {', '.join(sorted(PRESETS))}")
