"""The options of `models`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_at_least_one
from experiments.mesh_option import MeshShape, mesh_devices


@dataclass(frozen=True)
class ModelsConfig:
    """List the architectures and presets that load, and the memory that weights and KV cache
    take."""

    model: Annotated[str | None, by_default("STR", "all presets")] = None
    """Show this one only: `smollm2`, `random:PRESET`, a GGUF file, a folder with config.json, or
    ORG/NAME[@REVISION] if it has been fetched from the hub before."""

    max_positions: Annotated[int | None, by_default("INT", "as many as the model has")] = None
    """Most tokens of a sequence of that model."""

    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights and KV cache."""

    requests: int = 32
    """Requests whose KV cache is held at once."""

    shared_tokens: int = 2048
    """Tokens that all of them begin with."""

    own_tokens: int = 256
    """Tokens of each request behind those, its answer included."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    mesh: MeshShape = None
    """Tells the memory of each device, of models that so many can share."""


def check(config: ModelsConfig) -> None:
    """Raise `UserError` for a value that makes no sense."""
    check_at_least_one(config, "requests", "own_tokens", "chunk_size", "max_positions")
    if config.shared_tokens < 0:
        raise UserError(f"--shared-tokens must be from 0 up, got {config.shared_tokens}")
    mesh_devices(config.mesh)
    if config.max_positions is not None and config.model is None:
        raise UserError("--max-positions is of one model: name it with --model")
