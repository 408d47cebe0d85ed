"""Writes tiny GGUF checkpoints the way llama.cpp's converter does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models.architectures.llama import LLAMA
from models.config import DecoderConfig
from models.layout import expected_shapes
from models.rope import Rope

CONFIG = DecoderConfig(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope(500.0),
    max_positions=128,
)
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}{% endfor %}"


def checkpoint_tensors(config: DecoderConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors in rotate-half order, `[out, in]`, by GGUF name."""
    assert LLAMA.gguf is not None
    random = np.random.default_rng(seed)
    return {
        name: random.normal(1.0 if len(shape) == 1 else 0.0, 0.2, shape).astype(np.float32)
        for name, shape in expected_shapes(LLAMA.gguf.layout, config).items()
    }


def interleave_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """`permute` of llama.cpp's convert_hf_to_gguf.py, from rotate-half to neighbouring pairs."""
    shape = (num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def config_metadata(config: DecoderConfig) -> dict[str, Any]:
    """Every `llama.*` key of `config` but the vocabulary's size, which the embedding tells."""
    assert isinstance(config.rope, Rope)
    return {
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_positions,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.rope.freq_base": config.rope.theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.norm_epsilon,
    }


def tokenizer_metadata() -> dict[str, Any]:
    """A byte-level vocabulary of 256 bytes, one merge ("he") and two control tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(rest))]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*characters, "he", "<s>", "</s>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3, 3],
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 257,
        "tokenizer.ggml.eos_token_id": 258,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write_checkpoint(
    path: Path,
    *,
    config: DecoderConfig = CONFIG,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a checkpoint; `metadata` and `tensors` override entries, or drop those set to None."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (
        config_metadata(config) | tokenizer_metadata() | dict(metadata or {})
    ).items():
        _add_metadata(writer, key, value)
    for name, tensor in {**checkpoint_tensors(config), **(tensors or {})}.items():
        if tensor is None:
            continue
        if name.endswith("attn_q.weight"):
            tensor = interleave_rows(tensor, config.num_heads)
        if name.endswith("attn_k.weight"):
            tensor = interleave_rows(tensor, config.num_kv_heads)
        kind = gguf.GGMLQuantizationType.F32 if tensor.ndim == 1 else quantization
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_metadata(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif value is not None:
        writer.add_uint32(key, value)
