"""Keys and values of full chunks, encoded: how chunks are written, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.codecs import ChunkCodec
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.stored_kv import StoredKV

Encoded = dict[str, Shaped[Array, "L Hkv N ..."]]
"""What a codec stores, by name, of every chunk of every layer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CodedKV:
    """Keys and values of one layer, encoded as they are in the pool of all layers.

    Whoever reads a chunk reads these codes. What is not in a full chunk is not here.

    Letters: L layers, Hkv KV heads, N chunks of C tokens, D numbers of a head.
    """

    keys: Encoded
    values: Encoded
    layer: int | Int32[Array, ""]  # may be traced
    codec: ChunkCodec = field(metadata={"static": True})
    chunk_size: int = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})

    @property
    def dtype(self) -> jnp.dtype:
        """What chunks are decoded to."""
        return jnp.dtype(jnp.float32)

    @property
    def kv_heads(self) -> int:
        return self._any.shape[1]

    @property
    def num_chunks(self) -> int:
        return self._any.shape[2]

    @property
    def _any(self) -> Array:
        return next(iter(self.keys.values()))

    def layer_operand(self) -> Int32[Array, " 1"]:
        """The layer, as Pallas kernels take it."""
        return jnp.asarray(self.layer, jnp.int32).reshape(1)

    def all_keys(self) -> Float32[Array, "Hkv N C D"]:
        """Keys of every chunk."""
        return self.codec.keys.decode(self._of_layer(self.keys))

    def all_values(self) -> Float32[Array, "Hkv N C D"]:
        """Values of every chunk."""
        return self.codec.values.decode(self._of_layer(self.values))

    def _of_layer(self, encoded: Encoded) -> dict[str, Shaped[Array, "Hkv N ..."]]:
        return jax.tree.map(lambda array: array[self.layer], encoded)

    def gather(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> tuple[Float32[Array, "*rows tokens D"], Float32[Array, "*rows tokens D"]]:
        """Keys and values of one head, of the W * C tokens of these chunks, which must be there."""

        def tokens(codec, encoded):
            def chunks(array):
                return array.at[self.layer, head, chunk_ids].get(mode="promise_in_bounds")

            return codec.decode(jax.tree.map(chunks, encoded)).reshape(
                *chunk_ids.shape[:-1], -1, self.head_dim
            )

        return tokens(self.codec.keys, self.keys), tokens(self.codec.values, self.values)

    def write(
        self,
        k: Float[Array, "M C Hkv D"],
        v: Float[Array, "M C Hkv D"],
        chunks: Int32[HostOrDevice, " M"],
    ) -> CodedKV:
        """With chunk `chunks[m]` holding the codes of `k[m]` and `v[m]`; N or more drops them."""

        def put(codec, encoded, new):
            def put_one(array, codes):
                target = array.at[self.layer, :, chunks]
                return target.set(codes, mode="drop", unique_indices=True)

            return jax.tree.map(put_one, encoded, codec.encode(jnp.swapaxes(new, 1, 2)))

        keys = put(self.codec.keys, self.keys, k)
        values = put(self.codec.values, self.values, v)
        return CodedKV(keys, values, self.layer, self.codec, self.chunk_size, self.head_dim)


LayerKV = StoredKV | CodedKV
"""One layer of a pool, whatever its chunks are stored as."""


@dataclass(frozen=True)
class HeadKV:
    """Keys and values of one KV head of one layer."""

    stored: LayerKV
    head: Int32[Array, ""]

    def gather(
        self, chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> tuple[Float32[Array, "*rows tokens D"], Float32[Array, "*rows tokens D"]]:
        """Keys and values of the W * C tokens of these chunks, which must be in the pool."""
        return self.stored.gather(self.head, chunk_ids)
