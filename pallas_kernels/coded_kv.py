"""Keys and values of full chunks, encoded: how chunks are written, and how they are read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, Shaped

from pallas_kernels.clusters.clustered_kv import ClusteredKV
from pallas_kernels.codecs import ChunkCodec, ChunkContext, Constants, TensorCodec, spread
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
    key_constants: Constants = field(default_factory=dict)  # L Hkv n
    value_constants: Constants = field(default_factory=dict)

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
        constants = spread(self._of_layer(self.key_constants), (self.kv_heads, 1))
        return self.codec.keys.decode(self._of_layer(self.keys), constants)

    def all_values(self) -> Float32[Array, "Hkv N C D"]:
        """Values of every chunk."""
        constants = spread(self._of_layer(self.value_constants), (self.kv_heads, 1))
        return self.codec.values.decode(self._of_layer(self.values), constants)

    def _of_layer(self, encoded: Encoded) -> dict[str, Shaped[Array, "Hkv ..."]]:
        return jax.tree.map(lambda array: array[self.layer], encoded)

    def gather(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> tuple[Float32[Array, "*rows tokens D"], Float32[Array, "*rows tokens D"]]:
        """Keys and values of one head, of the W * C tokens of these chunks, which must be there."""

        values = self.codec.values, self.values, self.value_constants
        return self.gather_keys(head, chunk_ids), self._gather(*values, head, chunk_ids)

    def gather_keys(
        self, head: Int32[Array, ""], chunk_ids: Int32[HostOrDevice, "*rows W"]
    ) -> Float32[Array, "*rows tokens D"]:
        """The keys alone."""
        keys = self.codec.keys, self.keys, self.key_constants
        return self._gather(*keys, head, chunk_ids)

    def _gather(
        self,
        codec: TensorCodec,
        encoded: Encoded,
        constants: Constants,
        head: Int32[Array, ""],
        chunk_ids: Int32[HostOrDevice, "*rows W"],
    ) -> Float32[Array, "*rows tokens D"]:
        def chunks(array):
            return array.at[self.layer, head, chunk_ids].get(mode="promise_in_bounds")

        of_head = {name: array[self.layer, head] for name, array in constants.items()}
        known = spread(of_head, (1,) * chunk_ids.ndim)
        numbers = codec.decode(jax.tree.map(chunks, encoded), known)
        return numbers.reshape(*chunk_ids.shape[:-1], -1, self.head_dim)

    def write(
        self,
        k: Float[Array, "M C Hkv D"],
        v: Float[Array, "M C Hkv D"],
        chunks: Int32[HostOrDevice, " M"],
        begin: Int32[HostOrDevice, " M"],
    ) -> CodedKV:
        """With chunk `chunks[m]` holding the codes of `k[m]` and `v[m]`, tokens at positions from
        `begin[m]` on; N or more drops them."""
        begins = jnp.broadcast_to(jnp.asarray(begin)[:, None], (len(begin), self.kv_heads))

        def put(codec, encoded, new, constants):
            known = spread(self._of_layer(constants), (1, self.kv_heads))
            codes = codec.encode(jnp.swapaxes(new, 1, 2), ChunkContext(begins, known))

            def put_one(array, codes):
                target = array.at[self.layer, :, chunks]
                return target.set(codes, mode="drop", unique_indices=True)

            return jax.tree.map(put_one, encoded, codes)

        keys = put(self.codec.keys, self.keys, k, self.key_constants)
        values = put(self.codec.values, self.values, v, self.value_constants)
        return replace(self, keys=keys, values=values)


LayerKV = StoredKV | CodedKV | ClusteredKV
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
