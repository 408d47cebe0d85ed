"""Keys and values as the pool stores them: how new ones are written, and how chunks are read."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.plans import HostOrDevice
from pallas_kernels.pool_writes import put_tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StoredKV:
    """Keys and values of one layer, stored as they are in the pool of all layers.

    Letters: L layers, Hkv KV heads, N chunks of C tokens, D numbers of a head.
    """

    keys: Float[Array, "L Hkv N C D"]
    values: Float[Array, "L Hkv N C D"]
    layer: int | Int32[Array, ""]  # may be traced

    @property
    def codec(self) -> None:
        """Chunks are stored as they are."""
        return None

    @property
    def dtype(self) -> jnp.dtype:
        return self.keys.dtype

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]

    @property
    def num_chunks(self) -> int:
        return self.keys.shape[2]

    @property
    def chunk_size(self) -> int:
        return self.keys.shape[3]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[4]

    def layer_operand(self) -> Int32[Array, " 1"]:
        """The layer, as Pallas kernels take it."""
        return jnp.asarray(self.layer, jnp.int32).reshape(1)

    def all_keys(self) -> Float[Array, "Hkv N C D"]:
        """Keys of every chunk."""
        return self.keys[self.layer]

    def all_values(self) -> Float[Array, "Hkv N C D"]:
        """Values of every chunk."""
        return self.values[self.layer]

    def gather(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> tuple[Float32[Array, "*rows tokens D"], Float32[Array, "*rows tokens D"]]:
        """Keys and values of one head, of the W * C tokens of these chunks, which must be there."""
        return self.gather_keys(head, chunk_ids), self._gather(self.values, head, chunk_ids)

    def gather_keys(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> Float32[Array, "*rows tokens D"]:
        """The keys alone."""
        return self._gather(self.keys, head, chunk_ids)

    def _gather(self, pool: Array, head: Array, chunk_ids: HostOrDevice) -> Array:
        chunks = pool.at[self.layer, head, chunk_ids].get(mode="promise_in_bounds")
        return chunks.reshape(*chunk_ids.shape[:-1], -1, pool.shape[-1]).astype(jnp.float32)

    def write(
        self,
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        chunks: Int32[HostOrDevice, " T"],
        offsets: Int32[HostOrDevice, " T"],
    ) -> StoredKV:
        """With `k[t]`, `v[t]` in slot `offsets[t]` of chunk `chunks[t]`.

        A chunk of N or more drops the token. No two tokens may name one slot. Casts to the pool's
        dtype. Values are stored as finite numbers, 0 for NaN and the dtype's largest for what
        overflows it: attention multiplies every value of a chunk it reads, those no query sees by a
        weight of 0, and an infinity left in a chunk would reach whoever has it next. Keys are
        stored as they are, because a masked score is replaced and not multiplied. In place when
        donated; see `pallas_kernels.pool_writes`.
        """
        return self._write(k, v, chunks, offsets)

    def write_by_head(
        self,
        k: Float[Array, "T Hkv D"],
        v: Float[Array, "T Hkv D"],
        chunks: Int32[HostOrDevice, "Hkv T"],
        offsets: Int32[HostOrDevice, " T"],
    ) -> StoredKV:
        """The same with chunks of each head."""
        return self._write(k, v, chunks, offsets)

    def _write(self, k: Array, v: Array, chunks: HostOrDevice, offsets: HostOrDevice) -> StoredKV:
        finite = jnp.nan_to_num(v.astype(self.values.dtype))
        keys, values = (
            put_tokens(pool, new, self.layer, chunks, offsets)
            for pool, new in ((self.keys, k), (self.values, finite))
        )
        return StoredKV(keys, values, self.layer)
