"""`load`: a decoder from a checkpoint's folder, a GGUF file or the hub, or with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from jax.sharding import Mesh, Sharding

from jax_chunkattn.device.logical_axes import AXIS_RULES, MeshError, logical_sharding
from jax_chunkattn.device.mesh import mesh_for_heads
from models.building import OnProgress, Place, abstract_decoder, build
from models.config import DecoderConfig
from models.decoder import Decoder
from models.sources import RANDOM_PREFIX, open_checkpoint, random_checkpoint
from models.weights import Weight, decoder_weights
from pallas_kernels.targets import current_target

if TYPE_CHECKING:
    from models.tokenizer import ChatTokenizer

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """What `load` returns. `tokenizer` is None for a checkpoint without, and for random weights."""

    model: Decoder
    config: DecoderConfig
    tokenizer: ChatTokenizer | None
    name: str


def load(
    spec: str | Path,
    *,
    dtype: str = "float32",
    seed: int = 0,
    unroll: bool | None = None,
    max_positions: int | None = None,
    abstract: bool = False,
    mesh: Mesh | None = None,
    axis_rules: Mapping[str, str | tuple[str, ...]] = AXIS_RULES,
    on_progress: OnProgress = lambda done, total: None,
) -> LoadedModel:
    """Load the model that `spec` names, with weights and activations in `dtype`.

    Args:
      spec: the folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json); a
        GGUF file; the name of a repository on the hub ("org/name", "org/name@revision"), which is
        downloaded; or `random:<preset>`, for weights that are random, the same on every platform.
      seed: of random weights.
      unroll: run the layers one after another instead of in a scan, which on a GPU saves copies of
        the weights and takes longer to compile; None does what suits the device.
      max_positions: most tokens of a sequence; None is as many as the model has.
      abstract: shapes without values, but with places on a mesh, for tracing and compiling; only
        the config is read.
      mesh, axis_rules: the devices to place weights on, and which axes of the mesh split which
        logical axis; None is the default device. An axis `tp` that has more devices than the model
        has KV heads is made two: see `jax_chunkattn.device.mesh`.
      on_progress: called with the bytes of weights made so far, and of all.

    Raises:
      ValueError: an unknown dtype or preset; or heads, or a weight, that the mesh cannot split
        (`MeshError`): no weight has been read then.
      FileNotFoundError: there is no such file or folder.
      CheckpointError: the checkpoint cannot be used; the message names what is wrong with it.
      DownloadError: the hub cannot be reached, or has no such repository.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known dtypes: {', '.join(DTYPES)}")
    if unroll is None:
        unroll = current_target().platform == "gpu"
    if isinstance(spec, str) and spec.startswith(RANDOM_PREFIX):
        checkpoint = random_checkpoint(spec, seed, max_positions)
    else:
        checkpoint = open_checkpoint(spec, max_positions)
    config = checkpoint.config
    place = placing(mesh, config, axis_rules)
    if abstract:
        model = abstract_decoder(config, dtype, unroll=unroll, place=place)
    else:
        fill = checkpoint.fill()
        model = build(config, dtype, fill, unroll=unroll, place=place, on_progress=on_progress)
    return LoadedModel(model, config, checkpoint.tokenizer(), checkpoint.name)


def placing(
    mesh: Mesh | None,
    config: DecoderConfig,
    axis_rules: Mapping[str, str | tuple[str, ...]] = AXIS_RULES,
) -> Place:
    """How each weight of a decoder with this config lies on a mesh.

    Raises:
      MeshError: heads, or a weight, that the mesh cannot split.
    """
    if mesh is not None:
        mesh = mesh_for_heads(mesh, config.num_heads, config.num_kv_heads)
    place = partial(_sharding, mesh, axis_rules)
    for name, weight in decoder_weights(config).by_name().items():
        place(name, weight)
    return place


def _sharding(
    mesh: Mesh | None, rules: Mapping[str, str | tuple[str, ...]], name: str, weight: Weight
) -> Sharding | None:
    if mesh is None:
        return None
    try:
        return logical_sharding(weight.axes, weight.shape, mesh, rules)
    except MeshError as error:
        raise MeshError(f"{name}: {error}") from None
