"""Config and weights of a Llama-architecture decoder from a GGUF file.

Tensors are dequantised one by one into the stacked arrays `Decoder` holds, and one such array is
made at a time, so that the peak is the weights once and their largest array twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from models.config import DecoderConfig
from models.errors import CheckpointError
from models.gguf_file import GGUFFile

ARCHITECTURE = "llama"
BLOCK_PARTS = {
    "attention_norm": ("attn_norm",),
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attention_out": ("attn_output",),
    "mlp_norm": ("ffn_norm",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "down": ("ffn_down",),
}
"""For each weight of `models.decoder.Block`, the GGUF tensors that lie side by side in it."""


def read_config(file: GGUFFile) -> DecoderConfig:
    """The decoder's shape. Raises CheckpointError when the file holds another kind of model."""
    architecture = file.require("general.architecture")
    if architecture != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path}: architecture {architecture!r} is not supported, only {ARCHITECTURE!r}"
        )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: missing tensor token_embd.weight")
    hidden = _integer(file, "embedding_length")
    heads = _integer(file, "attention.head_count")
    head_dim = _integer(file, "attention.key_length", hidden // max(heads, 1))
    _check_attention(file, head_dim)
    try:
        return DecoderConfig(
            vocab_size=_integer(file, "vocab_size", embedding.shape[0]),
            hidden_size=hidden,
            intermediate_size=_integer(file, "feed_forward_length"),
            num_layers=_integer(file, "block_count"),
            num_heads=heads,
            num_kv_heads=_integer(file, "attention.head_count_kv", heads),
            head_dim=head_dim,
            rope_theta=float(file.metadata.get("llama.rope.freq_base", 10_000.0)),
            rms_norm_eps=float(file.require("llama.attention.layer_norm_rms_epsilon")),
            max_positions=_integer(file, "context_length"),
            tie_embeddings="output.weight" not in file.tensors,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: unusable metadata: {error}") from error


def read_weights(
    file: GGUFFile, config: DecoderConfig, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (path of the weight in `Decoder`, array in `dtype`), each made only when asked for.

    Raises CheckpointError naming every tensor that is missing, is unknown, or has another shape
    than `config` asks for, before any is read.
    """
    _check_tensors(file, config)
    yield "embedding", _read(file, "token_embd.weight", config).astype(dtype)
    yield "final_norm", _read(file, "output_norm.weight", config).astype(dtype)
    if not config.tie_embeddings:
        yield "unembedding", _read(file, "output.weight", config).astype(dtype)
    shapes = expected_shapes(config)
    for name, parts in BLOCK_PARTS.items():
        sizes = [shapes[f"blk.0.{part}.weight"][0] for part in parts]
        inputs = shapes[f"blk.0.{parts[0]}.weight"][1:]
        stacked = np.empty((config.num_layers, *inputs, sum(sizes)), dtype)
        for layer in range(config.num_layers):
            begin = 0
            for part, size in zip(parts, sizes, strict=True):
                values = _read(file, f"blk.{layer}.{part}.weight", config)
                stacked[layer, ..., begin : begin + size] = values
                begin += size
        yield f"blocks/{name}", stacked


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and `[out, in]` shape of every tensor a GGUF file of this config holds."""
    hidden, inner = config.hidden_size, config.intermediate_size
    block = {
        "attn_norm": (hidden,),
        "attn_q": (config.query_size, hidden),
        "attn_k": (config.kv_size, hidden),
        "attn_v": (config.kv_size, hidden),
        "attn_output": (hidden, config.query_size),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in block.items()}
    shapes["output_norm.weight"] = (hidden,)
    if not config.tie_embeddings:
        shapes["output.weight"] = (config.vocab_size, hidden)
    return shapes


def rotate_half_rows(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder the rows of a Q or K projection `[H*D, E]` from llama.cpp's order to rotate-half.

    llama.cpp rotates neighbours (2i, 2i + 1), and its converter permutes the rows of Q and K so
    that this equals rotating (i, i + D/2); here the permutation is undone.
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _read(file: GGUFFile, name: str, config: DecoderConfig) -> np.ndarray:
    """One tensor as `Decoder` wants it: a projection `[in, out]`, the embedding `[V, E]`."""
    values = file.tensors[name].dequantize()
    if name.endswith(("attn_q.weight", "attn_k.weight")):
        values = rotate_half_rows(values, config.head_dim)
    is_projection = values.ndim == 2 and name != "token_embd.weight"
    return values.T if is_projection else values


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    key = f"{ARCHITECTURE}.{key}"
    value = file.require(key) if default is None else file.metadata.get(key, default)
    if not isinstance(value, int):
        raise CheckpointError(f"{file.path}: metadata {key!r} is not one integer")
    return value


def _check_attention(file: GGUFFile, head_dim: int) -> None:
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise CheckpointError(f"{file.path}: rotary scaling {scaling!r} is not supported")
    rotated = _integer(file, "rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise CheckpointError(
            f"{file.path}: {rotated} of {head_dim} dimensions rotate; only all are supported"
        )
    value_length = _integer(file, "attention.value_length", head_dim)
    if value_length != head_dim:
        raise CheckpointError(
            f"{file.path}: keys have {head_dim} dimensions and values {value_length}; "
            "only equal ones are supported"
        )


def _check_tensors(file: GGUFFile, config: DecoderConfig) -> None:
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - file.tensors.keys())
    unknown = sorted(file.tensors.keys() - expected.keys())
    misshapen = sorted(
        f"{name} (is {file.tensors[name].shape}, expected {shape})"
        for name, shape in expected.items()
        if name in file.tensors and file.tensors[name].shape != shape
    )
    complaints = [
        f"{what}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" * (len(names) > 5))
        for what, names in [
            ("missing tensors", missing),
            ("tensors this decoder does not use", unknown),
            ("tensors of another shape", misshapen),
        ]
        if names
    ]
    if complaints:
        raise CheckpointError(f"{file.path}: {'; '.join(complaints)}")
