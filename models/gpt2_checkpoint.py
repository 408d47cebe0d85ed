"""A GPT-2 over bytes as a checkpoint in Hugging Face's layout: `GPT2LMHeadModel`.

A token is a byte, and its id the byte's value; one more token ends a text.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from models.architectures.gpt2 import GPT2
from models.config import DecoderConfig
from models.decoder import Decoder
from models.hf_config import read_config
from models.layout import Layout, every_weight, pieces
from models.presets import preset
from models.safetensors_file import write_tensors
from models.weights import decoder_weights
from models.whole_files import write_whole

BYTES = 256
END = "<|endoftext|>"
END_ID = BYTES

_CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n\n{% endfor %}"


def byte_gpt2(*, layers: int, heads: int, hidden: int, positions: int) -> DecoderConfig:
    """The config of a GPT-2 over bytes, with as many KV heads as query heads.

    Raises:
      ValueError: a size below 1, or `hidden` is no multiple of `heads`.
    """
    if min(layers, heads, hidden) < 1 or hidden % heads:
        raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads})")
    return replace(
        preset("gpt2"),
        vocab_size=BYTES + 1,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        max_positions=positions,
    )


def write_byte_gpt2(folder: str | Path, model: Decoder) -> None:
    """Writes what `models.load` takes: the config, the tokenizer, and float32 weights.

    The folder is made if it is not there, and each file is written as a whole; the weights, without
    which it is no checkpoint, come last. Needs the package tokenizers. Raises ValueError for a
    model with a config that `byte_gpt2` does not give.
    """
    folder = Path(folder)
    config = _hf_config(model.config)
    if read_config(config, GPT2, folder) != model.config or model.vocab_size != BYTES + 1:
        raise ValueError(f"not a GPT-2 over bytes: {model.config}")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    words = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": model.max_positions,
    }
    write_whole(folder / "tokenizer_config.json", json.dumps(words, indent=2) + "\n")
    write_whole(folder / "tokenizer.json", _tokenizer_json() + "\n")
    tensors = stored_tensors(model, GPT2.layout)
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def stored_tensors(model: Decoder, layout: Layout) -> dict[str, np.ndarray]:
    """The float32 tensors of a checkpoint that holds the weights of a model whose layers are
    stacked.

    The inverse of reading one. Raises ValueError for a layout that does more than order and
    transpose.
    """
    if layout.norm_offset or layout.position_offset or layout.interleaved:
        raise ValueError("only layouts that order and transpose can be written")
    found: dict[str, np.ndarray] = {}
    held = {
        name: np.asarray(_weight_of(model, name), np.float32)
        for name in decoder_weights(model.config).by_name()
    }
    for name, layer in every_weight(model.config):
        weight = held[name] if layer is None else held[f"blocks/{name}"][layer]
        for piece in pieces(layout, model.config, name, layer):
            stored = found.setdefault(piece.tensor, np.zeros(piece.shape, np.float32))
            turned = layout.is_transposed(piece.part, piece.inputs)
            target = (stored.T if turned else stored)[piece.rows]
            values = weight[piece.index]
            if piece.inputs:
                values = values.reshape(math.prod(values.shape[: piece.inputs]), -1).T
            target[...] = values.reshape(target.shape)
    return found


def _weight_of(model: Decoder, name: str) -> Any:
    found: Any = model
    for part in name.split("/"):
        found = getattr(found, part)
    assert isinstance(found, nnx.Param)
    return found[...]


def _hf_config(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": [GPT2.class_name],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.intermediate_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": True,
        "bos_token_id": END_ID,
        "eos_token_id": END_ID,
        "torch_dtype": "float32",
    }


def _tokenizer_json() -> str:
    """Of a tokenizer that merges nothing: GPT-2's, with bytes in their own order."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(END, normalized=False, special=True)])
    return backend.to_str()


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary: itself if it can be seen,
    else the next of those from 256 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in seen else next(others)) for byte in range(BYTES)]
