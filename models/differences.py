"""How an architecture differs from Llama, in words, derived from its declaration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.architectures.declaration import Architecture, Key
from models.architectures.llama import LLAMA
from models.config import DecoderConfig
from models.hf_config import read_config

_SIZES: dict[str, Any] = {
    "vocab_size": 8,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_layers": 12,  # enough for every pattern of layers to show
    "num_heads": 4,
    "max_positions": 8192,  # more than any window
}
_GATES = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU", "relu": "ReLU"}


def describe_differences(architecture: Architecture) -> str:
    """How `architecture` differs from Llama where its config.json leaves the defaults."""
    if architecture is LLAMA:
        return "RMS norms; rotary embedding; SwiGLU"
    return "; ".join(_differences(default_config(architecture))) or "nothing"


def default_config(architecture: Architecture) -> DecoderConfig:
    """A small decoder of this architecture, with its defaults for everything but sizes."""
    words = {
        source.name: _SIZES[field]
        for field, source in architecture.fields.by_name().items()
        if field in _SIZES and isinstance(source, Key)
    }
    return read_config(words, architecture, Path(architecture.class_name))


def _differences(config: DecoderConfig) -> Iterator[str]:
    if config.norm == "layer":
        yield "layer norms"
    if config.norm_after:
        yield "norms before and after" if config.norm_before else "norms after instead of before"
    if config.query_key_norm is not None:
        whole = {"head": "each head", "projection": "all heads"}[config.query_key_norm]
        yield f"queries and keys normalised over {whole}"
    if config.qkv_bias:
        everywhere = config.attention_out_bias and config.mlp_bias
        yield "biases everywhere" if everywhere else "biases of queries, keys and values"
    yield from _position_differences(config)
    if not config.gated_mlp:
        yield f"{_GATES[config.activation]} without a gate"
    elif config.activation != "silu":
        yield f"{_GATES[config.activation]} gates"
    if any(config.layer_windows):
        yield "sliding windows" if all(config.layer_windows) else "sliding windows in some layers"
    capped = [
        name
        for name, cap in (("scores", config.attention_softcap), ("logits", config.logit_softcap))
        if cap is not None
    ]
    if capped:
        yield f"{' and '.join(capped)} capped softly"
    if config.attention_scale is not None:
        yield "its own scale of scores"
    if config.embedding_scale is not None:
        yield "scaled embeddings"


def _position_differences(config: DecoderConfig) -> Iterator[str]:
    if config.learned_positions:
        yield "learned positions"
    kinds = set(config.layer_ropes)
    if len(kinds - {None}) > 1:
        yield f"{len(kinds - {None})} rotary embeddings"
    if None in kinds and len(kinds) > 1:
        yield "layers without positions"
