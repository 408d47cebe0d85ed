"""A GGUF file's metadata as the keys of config.json, and its architecture.

GGUF's keys are those of ggml's docs/gguf.md, and its tensors those of llama.cpp's converter, which
changes some weights: it permutes Llama's queries and keys, adds one to Gemma's norms, and
transposes GPT-2's matrices.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from models.architectures import ARCHITECTURES
from models.architectures.declaration import Architecture, GGUFFormat, Scalings
from models.errors import CheckpointError
from models.gguf_file import GGUFFile
from models.layout import Layout
from models.sizes import (
    MOST_HEAD_DIM,
    MOST_HEADS,
    MOST_LAYERS,
    MOST_SIZE,
    is_size,
    size_error,
)

_ROPE_FACTORS = "rope_freqs.weight"


def _kinds() -> dict[str, tuple[Architecture, GGUFFormat]]:
    kinds: dict[str, tuple[Architecture, GGUFFormat]] = {}
    for architecture in ARCHITECTURES.values():
        if architecture.gguf is not None:
            kinds.setdefault(architecture.gguf.name, (architecture, architecture.gguf))
    return kinds


KINDS = _kinds()
"""By name in GGUF files. Of architectures that share a name, the first one."""

_WORDS = {
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "block_count": ("num_hidden_layers", "n_layer"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "rope.freq_base": ("rope_theta",),
}
"""For each key of GGUF, without the architecture's name, the keys of config.json for it."""
_SCALING_WORDS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
}
_SIZES = {
    "embedding_length": MOST_SIZE,
    "feed_forward_length": MOST_SIZE,
    "block_count": MOST_LAYERS,
    "attention.head_count": MOST_HEADS,
    "attention.head_count_kv": MOST_HEADS,
    "attention.key_length": MOST_HEAD_DIM,
    "context_length": MOST_SIZE,
    "attention.sliding_window": MOST_SIZE,
    "rope.dimension_count": MOST_HEAD_DIM,
}
"""Keys that are integers, and their maximum; the minimum is 1."""
_REQUIRED = {
    "embedding_length",
    "feed_forward_length",
    "block_count",
    "attention.head_count",
    "context_length",
}


def gguf_architecture(file: GGUFFile) -> tuple[Architecture, Layout]:
    """The file's architecture. Raises CheckpointError when it is not supported."""
    name = file.require("general.architecture")
    if name not in KINDS:
        raise CheckpointError(
            f"{file.path}: architecture {name!r} is not supported in GGUF files, only "
            f"{', '.join(KINDS)}"
        )
    architecture, gguf = KINDS[name]
    if architecture.rotary is not None:
        rotary = replace(architecture.rotary, scalings=Scalings(turns_part=True))
        architecture = replace(architecture, rotary=rotary)
    return architecture, gguf.layout


def hf_words(file: GGUFFile) -> dict[str, Any]:
    """The file's metadata as a config.json; CheckpointError for what config.json cannot express."""
    name = file.require("general.architecture")
    config: dict[str, Any] = {"tie_word_embeddings": "output.weight" not in file.shapes}
    for key, words in _WORDS.items():
        value = file.metadata.get(f"{name}.{key}")
        if value is None and key in _REQUIRED:
            raise CheckpointError(f"{file.path}: metadata '{name}.{key}' is missing")
        if value == 0 and key == "attention.sliding_window":
            continue  # as llama.cpp's converter writes Phi-4, which has none
        if value is not None:
            config |= dict.fromkeys(words, _number(file, name, key))
    if "token_embd.weight" not in file.shapes:
        raise CheckpointError(f"{file.path}: missing tensor token_embd.weight")
    config["vocab_size"] = file.shapes["token_embd.weight"][0]
    by_heads = config["hidden_size"] // config["num_attention_heads"]
    head_dim = config.setdefault("head_dim", by_heads)
    values = file.metadata.get(f"{name}.attention.value_length", head_dim)
    if values != head_dim:
        raise CheckpointError(
            f"{file.path}: keys have {head_dim} dimensions and values {values}; only equal ones "
            "are supported"
        )
    _, gguf = KINDS[name]
    unscaled = config["num_hidden_layers"] == gguf.unscaled_layers
    config["query_pre_attn_scalar"] = by_heads if unscaled else head_dim
    return config | _rope_words(file, name, head_dim)


def _number(file: GGUFFile, name: str, key: str) -> Any:
    where, most = f"{file.path}: metadata '{name}.{key}'", _SIZES.get(key)
    value = file.metadata[f"{name}.{key}"]
    kinds = (int, float) if most is None else (int,)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise CheckpointError(f"{where} is not one {'number' if most is None else 'integer'}")
    if most is not None and not is_size(value, most=most):
        raise CheckpointError(size_error(where, value, most=most))
    return value


def _rope_words(file: GGUFFile, name: str, head_dim: int) -> dict[str, Any]:
    words: dict[str, Any] = {}
    key = "rope.dimension_count"
    if f"{name}.{key}" in file.metadata and (rotated := _number(file, name, key)) != head_dim:
        words["partial_rotary_factor"] = Fraction(rotated, max(head_dim, 1))
    kind = file.metadata.get(f"{name}.rope.scaling.type", "none")
    if kind != "none":
        words["rope_scaling"] = {"rope_type": kind} | {
            word: file.metadata[f"{name}.rope.scaling.{key}"]
            for key, word in _SCALING_WORDS.items()
            if f"{name}.rope.scaling.{key}" in file.metadata
        }
    if _ROPE_FACTORS in file.shapes:
        if kind != "none":
            raise CheckpointError(f"{file.path}: rotary scaling {kind!r} beside {_ROPE_FACTORS}")
        with file.tensor(_ROPE_FACTORS) as factors:
            words["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": factors.tolist(),
                "long_factor": factors.tolist(),
                "attention_factor": 1.0,
            }
    return words
