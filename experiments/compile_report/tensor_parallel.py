"""The decode loop on several GPUs, as an engine on a mesh runs it: the real decoder, its weights
and the pool laid over `tp`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax import lax

from experiments.compile_report.cases import Case
from experiments.compile_report.program_sizes import (
    ProgramSize,
    abstract_pool,
    abstract_state,
    decode_arguments,
)
from experiments.compile_report.target import GpuTarget, device_mesh
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.mesh import EngineMesh
from jax_chunkattn.device.programs import SplitModel
from models.building import abstract_decoder
from models.loading import placing


def tensor_parallel_case(
    size: ProgramSize, implementation: str, num_devices: int, target: GpuTarget
) -> Case:
    """K steps for B rows on several GPUs, each with a part of the heads; the pool is donated.

    The pool has as many times the chunks: as many bytes on each GPU as it has on one alone, where a
    layer of it dwarfs the logits.
    """
    size, config = replace(size, num_chunks=num_devices * size.num_chunks), size.config
    mesh = EngineMesh.of(device_mesh(target, num_devices), config.cache_spec)
    place = placing(mesh.mesh, config)
    model = SplitModel.of(abstract_decoder(config, size.dtype, unroll=True, place=place))
    pool = abstract_pool(size)
    places = mesh.places(abstract_state(size, pool))
    state, *rest = decode_arguments(size, pool)
    state = jax.tree.map(_placed, state, places)
    rest = jax.tree.map(lambda array: _placed(array, mesh.whole), rest)

    def decode(leaves, *arguments):
        state, chosen = decode_steps(
            model.merge(leaves),
            *arguments,
            num_steps=size.steps,
            implementation=implementation,
            mesh=mesh,
        )
        return (
            lax.with_sharding_constraint(state, places),
            lax.with_sharding_constraint(chosen, mesh.whole),
        )

    keys = pool.keys.size * pool.keys.dtype.itemsize // mesh.head_devices
    layer = keys // config.num_layers
    return Case(decode, (model.leaves, state, *rest), (1,), 2 * keys, layer)


def _placed(array: Any, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
