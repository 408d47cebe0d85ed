"""Learned prefixes as Hugging Face's peft keeps them: of prefix tuning, and of its cartridges.

A folder with `adapter_config.json` and `adapter_model.safetensors`, whose one tensor
`prompt_embeddings` has of each virtual token the keys and values of all layers, one layer's after
another's. If an MLP made them while they were trained, peft has run it when it saved.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from jax_chunkattn.device.model_interface import CacheSpec
from models.errors import CheckpointError
from models.safetensors_file import read_tensors, write_tensors
from models.sizes import is_size, shown
from models.whole_files import write_whole

CONFIG, WEIGHTS, TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
KINDS = "PREFIX_TUNING", "CARTRIDGE"
"""Of adapters, as peft calls them, that are keys and values in the place of tokens."""


@dataclass(frozen=True)
class PrefixArrays:
    """What `Engine.add_prefix` takes: of m virtual tokens, for L layers of Hkv KV heads of D."""

    keys: Float32[np.ndarray, "L Hkv m D"]
    values: Float32[np.ndarray, "L Hkv m D"]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]


def prefix_files(folder: Path) -> tuple[Path, Path]:
    """Those that are read of a prefix's folder."""
    return folder / CONFIG, folder / WEIGHTS


def load_prefix(folder: str | Path, spec: CacheSpec) -> PrefixArrays:
    """A prefix that peft has saved for a model whose `cache_spec` this is.

    Keys are read as they are, without rotary embedding, as peft reads them.

    Raises:
      CheckpointError: when the folder has no such prefix, or it is of a model of another shape.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tokens = config.get("num_virtual_tokens")
    expected = {"num_layers": spec.num_layers, "num_attention_heads": spec.num_kv_heads}
    for name, ours in expected.items():
        given = config.get(name)
        if given is not None and given != ours:
            raise CheckpointError(
                f"{folder / CONFIG}: {name} is {shown(given)}, and the model has {ours}: the "
                "prefix was trained for another one"
            )
    if not is_size(tokens, least=1):
        raise CheckpointError(
            f"{folder / CONFIG}: num_virtual_tokens must be a number from 1, got {shown(tokens)}"
        )
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise CheckpointError(
            f"{folder}: there is no {WEIGHTS}"
            + (": pickled files are not read, save it again with safetensors" if pickled else "")
        )
    tensor = read_tensors(path).get(TENSOR)
    shape = (tokens, spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim)
    if tensor is None or tensor.shape != shape:
        found = "is not there" if tensor is None else f"has shape {tensor.shape}"
        raise CheckpointError(
            f"{path}: {TENSOR} {found}; {tokens} virtual tokens of the model have shape {shape}"
        )
    with tensor.values() as stored:
        flat = np.asarray(stored, np.float32)
    parts = flat.reshape(tokens, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    keys, values = np.ascontiguousarray(parts.transpose(2, 1, 3, 0, 4))
    return PrefixArrays(keys, values)


def save_prefix(folder: str | Path, prefix: PrefixArrays, *, base_model: str | None = None) -> None:
    """Writes a prefix as peft would, which can load it; `base_model` is the name of the model.

    The folder is made if it is not there; the weights, without which it is no prefix, come last.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers, heads, tokens, dim = prefix.keys.shape
    config = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": tokens,
        "peft_type": KINDS[0],
        "prefix_projection": False,
        "task_type": "CAUSAL_LM",
        "token_dim": heads * dim,
    }
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    both = np.stack([prefix.keys, prefix.values]).transpose(3, 1, 0, 2, 4)  # m L 2 Hkv D
    flat = np.ascontiguousarray(both.reshape(tokens, -1))
    write_tensors(folder / WEIGHTS, {TENSOR: flat}, {"format": "pt"})


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"no learned prefix can be read from {path.parent}: {path.name} "
            f"({error.strerror or error})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise CheckpointError(
            f"{path}: peft_type is {shown(kind)}; {' and '.join(KINDS)} are keys and values of "
            "virtual tokens, and no other kind is read"
        )
    task, copies = config.get("task_type"), config.get("num_transformer_submodules")
    if task not in (None, "CAUSAL_LM") or copies not in (None, 1):
        raise CheckpointError(
            f"{path}: the prefix is for {shown(task)} with {shown(copies)} stacks, and engines "
            "decode one (CAUSAL_LM)"
        )
    return config
