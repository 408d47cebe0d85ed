"""What `models` tells: of each architecture, and of each model its shape and its memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from experiments.harness.errors import UserError
from experiments.loading import SMOLLM2, ModelSource, fetch_model
from experiments.mesh_option import mesh_devices
from experiments.models.config import ModelsConfig
from jax_chunkattn.device.logical_axes import MeshError, logical_sharding
from jax_chunkattn.device.mesh import COPIES, TP, divide
from models import PRESETS, DecoderConfig
from models.architectures import ARCHITECTURES
from models.differences import describe_differences
from models.parity import GGUF_ARCHITECTURES, Parity, read_parity
from models.sources import open_checkpoint, random_checkpoint
from models.weights import Weight, decoder_weights, num_parameters


@dataclass(frozen=True)
class Batch:
    """Requests of equal lengths that begin with the same tokens."""

    requests: int
    shared_tokens: int
    own_tokens: int
    chunk_size: int

    @property
    def tokens(self) -> int:
        """Of each request."""
        return self.shared_tokens + self.own_tokens

    @property
    def chunks_unshared(self) -> int:
        return self.requests * self._chunks_of_one

    @property
    def chunks_shared(self) -> int:
        """Whole chunks are shared; what is left of the shared tokens each request has itself."""
        common = self.shared_tokens // self.chunk_size
        return common + self.requests * (self._chunks_of_one - common)

    @property
    def _chunks_of_one(self) -> int:
        return -(-self.tokens // self.chunk_size)


def summarise(config: ModelsConfig, source: ModelSource | None) -> dict[str, Any]:
    """All that is printed, as JSON values; only the model of `source`, if there is one.

    Raises:
        UserError: an unknown preset, a model of the hub that was never fetched, or a file that
            cannot be opened.
        models.DownloadError: the model cannot be fetched.
        models.CheckpointError: its config cannot be used.
    """
    batch = Batch(config.requests, config.shared_tokens, config.own_tokens, config.chunk_size)
    devices = mesh_devices(config.mesh)
    settings = ("mesh", "dtype", "requests", "shared_tokens", "own_tokens", "chunk_size")
    summary: dict[str, Any] = {
        "experiment": "models",
        **{name: getattr(config, name) for name in settings},
        "chunks_shared": batch.chunks_shared,
        "chunks_unshared": batch.chunks_unshared,
    }
    if source is not None:
        decoder = _read_config(source, config.max_positions)
        one = describe_model(source.name, decoder, config.dtype, batch, devices)
        return summary | {"models": [one]}
    parity = read_parity()
    return summary | {
        "architectures": [_describe_architecture(name, parity) for name in ARCHITECTURES],
        "parity": parity and {"versions": dict(parity.versions), "date": parity.date},
        "models": [
            describe_model(name, decoder, config.dtype, batch, devices)
            for name, decoder in PRESETS.items()
            if _can_share(decoder, config.dtype, devices or 1)
        ],
    }


def describe_model(
    name: str, decoder: DecoderConfig, dtype: str, batch: Batch, devices: int | None = None
) -> dict[str, Any]:
    """Shape and memory of one model; None for what a batch holds whose requests are too long.

    The memory is of one of so many devices that share it.

    Raises:
        MeshError: so many cannot.
    """
    weights, values = device_share(decoder, dtype, devices or 1)
    per_token = values * jnp.dtype(dtype).itemsize
    per_chunk = per_token * batch.chunk_size
    fits = batch.tokens <= decoder.max_positions
    return {
        "name": name,
        "parameters": num_parameters(decoder),
        "layers": decoder.num_layers,
        "query_heads": decoder.num_heads,
        "kv_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "max_positions": decoder.max_positions,
        "weight_bytes": weights,
        "kv_bytes_per_token": per_token,
        "kv_bytes_shared": batch.chunks_shared * per_chunk if fits else None,
        "kv_bytes_unshared": batch.chunks_unshared * per_chunk if fits else None,
    }


def device_share(decoder: DecoderConfig, dtype: str, devices: int) -> tuple[int, int]:
    """Of one of so many devices along `tp`: bytes of its part of all weights, in `dtype` but for
    those that stay float32; and numbers that it keeps of a token.

    Raises:
        MeshError: so many cannot share it.
    """
    head_devices, copies = divide(devices, decoder.num_heads, decoder.num_kv_heads)
    mesh = AbstractMesh((head_devices, copies), (TP, COPIES))

    def nbytes(weight: Weight) -> int:
        place = logical_sharding(weight.axes, weight.shape, mesh)
        return math.prod(place.shard_shape(weight.shape)) * jnp.dtype(weight.dtype(dtype)).itemsize

    weights = decoder_weights(decoder).by_name().values()
    return sum(map(nbytes, weights)), decoder.cache_spec.values_per_token // head_devices


def _can_share(decoder: DecoderConfig, dtype: str, devices: int) -> bool:
    try:
        device_share(decoder, dtype, devices)
    except MeshError:
        return False
    return True


def _describe_architecture(class_name: str, parity: Parity | None) -> dict[str, Any]:
    architecture = ARCHITECTURES[class_name]
    agreement = parity.agreement(class_name) if parity else None
    return {
        "class_name": class_name,
        "models": architecture.models,
        "beside_llama": describe_differences(architecture),
        "gguf": class_name in GGUF_ARCHITECTURES,
        "parity": agreement and dataclasses.asdict(agreement),
    }


def _read_config(source: ModelSource, max_positions: int | None) -> DecoderConfig:
    if source.is_random:
        return random_checkpoint(str(fetch_model(source)), 0, max_positions).config
    here = source.name == SMOLLM2 or source.path is not None
    spec = fetch_model(source) if here else _cached(source.name)
    try:
        return open_checkpoint(spec, max_positions).config
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--model {source.name} cannot be read ({reason})") from error


def _cached(name: str) -> Path:
    """The folder in the hub's cache with this model's config.json: gigabytes of weights are not
    fetched to tell their size."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = name.partition("@")
    config = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    if not isinstance(config, str):
        raise UserError(
            f"--model {name}: it is not in the cache of the Hugging Face hub; "
            f"`python -m experiments generate --model {name}` fetches it"
        )
    return Path(config).parent
