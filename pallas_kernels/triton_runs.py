"""Runs of tokens that the Triton kernels attend to, by where their keys and values are.

The words of `pallas_kernels.triton_tiles` are used here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.clusters import ClusteredKV
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.triton_codes import ChunkRows, CodedHead, decoder
from pallas_kernels.triton_shape import KernelShape
from pallas_kernels.triton_tiles import Tile, Tiles


class ClusterRefs(NamedTuple):
    """Keys of clusters, in a kernel, and where those that a head reads are."""

    keys: Any  # a reference [K, N, C, D]
    head_slots: Any  # a reference [L, N, Hq]
    begin: Any  # a reference [1]: the layer's first slot


def keys_operand(stored: LayerKV) -> Any:
    """What is stored of keys, as kernels take it; in a kernel, of references: see `HeadKVRefs`."""
    if isinstance(stored, ClusteredKV):
        return ClusterRefs(stored.keys, stored.head_slots, stored.begin_operand())
    return stored.keys


@dataclass(frozen=True)
class HeadKVRefs:
    """Keys and values of one KV head of one layer, in a kernel."""

    keys: Any  # the pool's reference [L, Hkv, N, C, D], those of a codec by name, or of clusters
    values: Any
    layer: jax.Array
    head: jax.Array


@dataclass(frozen=True)
class Run:
    """Consecutive tokens in the chunks named by `table[*row, begin:]`."""

    table: Any  # a reference
    row: tuple[jax.Array, ...]
    begin: jax.Array | int
    num_tokens: jax.Array


def tiles_of(kv: HeadKVRefs, run: Run, shape: KernelShape) -> Tiles:
    """The tokens of a run of chunks, as these are stored."""
    if shape.codec is not None:
        return _CodedRun(kv, run, shape)
    return _StoredRun(*_pools_of(kv, run, shape), run, shape, *_tile_indices(shape))


class _HeadPool(NamedTuple):
    """The chunks of one head."""

    pool: Any  # a reference [..., N, C, D]
    place: tuple[jax.Array, ...]


def _pools_of(kv: HeadKVRefs, run: Run, shape: KernelShape) -> tuple[_HeadPool, _HeadPool]:
    """Keys and values. All chunks of a run are of one sequence, so with clusters the first of them
    says for all which keys a head reads."""
    if not isinstance(kv.keys, ClusterRefs):
        place = kv.layer, kv.head
        return _HeadPool(kv.keys, place), _HeadPool(kv.values, place)
    keys, head_slots, begin = kv.keys
    place = *run.row, jnp.asarray(run.begin, jnp.int32)
    first = plt.load(run.table.at[place], mask=run.num_tokens > 0, other=0)
    slot = head_slots[kv.layer, _inside(first, shape), kv.head].astype(jnp.int32)
    group = shape.attention.heads.kv_heads // kv.values.shape[1]
    return _HeadPool(keys, (begin[0] + slot,)), _HeadPool(kv.values, (kv.layer, kv.head // group))


@dataclass(frozen=True)
class _StoredRun:
    """Chunks stored as they are: a step has one tile, of one chunk or of several."""

    keys: _HeadPool
    values: _HeadPool
    run: Run
    shape: KernelShape
    dims: Int32[Array, " Dp"]
    slot: Int32[Array, " T"]

    def steps(self) -> Int32[Array, ""]:
        return pl.cdiv(self.run.num_tokens, self.shape.key_tile)

    def at(self, step: Int32[Array, ""]) -> list[Tile]:
        keys, values = self.keys, self.values
        place = _place(self.run, self.shape, step, self.slot)
        token = step * self.shape.key_tile + self.slot
        there = token < self.run.num_tokens

        def load(of: _HeadPool) -> Float[Array, "T Dp"]:
            in_chunk = place.rows[:, None], self.dims[None]
            where = of.pool.at[(*of.place, place.column(), *in_chunk)]
            return _load_exact(where, there, self.dims, self.shape)

        return [Tile(token, there, place.chunk, lambda: load(keys), lambda: load(values))]


@dataclass(frozen=True)
class _CodedRun:
    """Encoded chunks: a step has a tile of every part of a chunk, or of several."""

    kv: HeadKVRefs
    run: Run
    shape: KernelShape

    def steps(self) -> Int32[Array, ""]:
        chunks = pl.cdiv(self.run.num_tokens, self.shape.chunk_size)
        return pl.cdiv(chunks * self.shape.part_tokens, self.shape.key_tile)

    def at(self, step: Int32[Array, ""]) -> list[Tile]:
        kv, shape, codec = self.kv, self.shape, self.shape.codec
        assert codec is not None

        def place(slot: Int32[Array, "*slots"]) -> ChunkRows:
            return _place(self.run, shape, step, slot)

        keys = decoder(codec.keys, CodedHead(kv.keys, kv.layer, kv.head, place, shape))
        values = decoder(codec.values, CodedHead(kv.values, kv.layer, kv.head, place, shape))
        here = place(jnp.arange(shape.key_tile, dtype=jnp.int32))

        def tile(part: int) -> Tile:
            token = here.chunk * shape.chunk_size + part * shape.part_tokens + here.rows
            return Tile(
                token,
                token < self.run.num_tokens,
                here.chunk,
                lambda: keys(part).astype(shape.dtype),
                lambda: values(part).astype(shape.dtype),
            )

        return [tile(part) for part in range(shape.parts)]


def _place(
    run: Run, shape: KernelShape, step: Int32[Array, ""], slot: Int32[Array, "*slots"]
) -> ChunkRows:
    """Where tokens are that have these indices in a tile of a step."""
    tokens = shape.key_tile
    if shape.part_tokens >= tokens:
        per_part = shape.part_tokens // tokens
        chunk = lax.div(step, jnp.int32(per_part))
        ids = run.table[(*run.row, run.begin + chunk)]
        rows = lax.rem(step, jnp.int32(per_part)) * tokens + slot
    else:
        chunk = step * (tokens // shape.part_tokens) + slot // shape.part_tokens
        there = chunk * shape.chunk_size < run.num_tokens
        ids = plt.load(run.table.at[(*run.row, run.begin + chunk)], mask=there, other=0)
        rows = slot % shape.part_tokens
    return ChunkRows(chunk, _inside(ids, shape), rows)


def _inside(ids: Int32[Array, "*chunks"], shape: KernelShape) -> Int32[Array, "*chunks"]:
    """Chunks of the pool; some other one for those that are nowhere."""
    return jnp.clip(ids, 0, shape.num_chunks - 1)


@dataclass(frozen=True)
class PackedRun:
    """Exact tokens, one after another from `begin` on, in the order that a call computes them."""

    keys: Any  # a reference [T, Hkv, D]
    values: Any
    head: jax.Array
    begin: jax.Array
    num_tokens: jax.Array
    shape: KernelShape

    def steps(self) -> Int32[Array, ""]:
        return pl.cdiv(self.num_tokens, self.shape.key_tile)

    def at(self, step: Int32[Array, ""]) -> list[Tile]:
        dims, slot = _tile_indices(self.shape)
        token = step * self.shape.key_tile + slot
        there = token < self.num_tokens

        def load(packed: Any) -> Float[Array, "T Dp"]:
            where = packed.at[(self.begin + token)[:, None], self.head, dims[None]]
            return _load_exact(where, there, dims, self.shape)

        keys, values = self.keys, self.values
        return [Tile(token, there, jnp.int32(0), lambda: load(keys), lambda: load(values))]


def _tile_indices(shape: KernelShape) -> tuple[Int32[Array, " Dp"], Int32[Array, " T"]]:
    return (
        jnp.arange(shape.padded_dim, dtype=jnp.int32),
        jnp.arange(shape.key_tile, dtype=jnp.int32),
    )


def _load_exact(
    where: Any, there: Bool[Array, " T"], dims: Int32[Array, " Dp"], shape: KernelShape
) -> Float[Array, "T Dp"]:
    """Numbers stored as they are, rounded to the kernel's dtype; zeros where there are none."""
    mask = there[:, None]
    if shape.padded_dim != shape.head_dim:
        mask = mask & (dims < shape.head_dim)[None]
    mask = jnp.broadcast_to(mask, (len(there), len(dims)))
    return plt.load(where, mask=mask, other=0.0).astype(shape.dtype)
