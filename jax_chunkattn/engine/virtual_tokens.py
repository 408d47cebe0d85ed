"""Learned prefixes: keys and values that no token has, as chunks at the beginning of sequences.

Prefix tuning (Li and Liang, arXiv 2101.00190) trains keys and values of a few virtual tokens for
each layer, and Control Prefixes (arXiv 2110.08329) one such prefix for each attribute, beside one
for all. Attention does not mind the order of what it reads, so the one for all comes first here:
then it is shared by all attributes.

The tree knows virtual tokens by ids that no vocabulary has, made of their keys and values. So equal
prefixes are one, chains share what they begin with, and what follows a prefix is found behind it
alone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.device import Device
from jax_chunkattn.device.model_interface import CacheSpec
from jax_chunkattn.tree.nodes import SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree

FIRST_ID = 1 << 30
"""The least id of a virtual token: more than any vocabulary has, and within int32."""
LEAST_CHUNK = 4
"""Tokens: the ids of a chunk have 30 bits each, and with fewer two prefixes might be taken for
one."""


class InvalidPrefix(ValueError):
    """Keys and values that an engine cannot have as a learned prefix; nothing has changed."""


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """Virtual tokens of one prefix, behind those of another if it comes after one.

    Letters: L layers, Hkv KV heads, P chunks of C tokens, D numbers of a head.

    Attributes:
      name: by which requests ask for them.
      ids: of all of them, those of the other prefix first.
      keys, values: of its own chunks.
      after: the other prefix.
    """

    name: str
    ids: tuple[int, ...]
    keys: Float32[np.ndarray, "P L Hkv C D"]
    values: Float32[np.ndarray, "P L Hkv C D"]
    after: VirtualTokens | None

    @classmethod
    def of(
        cls,
        name: str,
        keys: Float32[np.ndarray, "L Hkv m D"],
        values: Float32[np.ndarray, "L Hkv m D"],
        chunk_size: int,
        after: VirtualTokens | None = None,
    ) -> VirtualTokens:
        """In whole chunks, of which m tokens must make some."""
        keys, values = _in_chunks(keys, chunk_size), _in_chunks(values, chunk_size)
        ids = list(after.ids) if after is not None else []
        for chunk in zip(keys, values, strict=True):
            ids.extend(_ids_of(*chunk))
        return cls(name, tuple(ids), keys, values, after)

    @cached_property
    def namespace(self) -> bytes:
        """What tells statistics about it from those of others."""
        return hashlib.blake2b(np.array(self.ids, np.int32).tobytes(), digest_size=16).digest()

    def chunk(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values, [L, Hkv, C, D], of a chunk of all there are."""
        own = index - (len(self.ids) // self.keys.shape[3] - len(self.keys))
        if own < 0:
            assert self.after is not None, "it has chunks before its own"
            return self.after.chunk(index)
        return self.keys[own], self.values[own]


def check_prefix(
    name: Any, keys: Any, values: Any, spec: CacheSpec, cache: CacheConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of a prefix for a model and a cache, in float32.

    Raises:
      InvalidPrefix: for what is none, or cannot be stored.
    """
    if not isinstance(name, str) or not name:
        raise InvalidPrefix(f"a prefix needs a name that is text, got {name!r:.60}")
    if not cache.takes_given_chunks:
        raise InvalidPrefix(
            "clusters are found by the queries of a sequence's first chunk, and virtual tokens "
            "have none: an engine with clusters takes no learned prefix"
        )
    arrays = []
    for what, given in (("keys", keys), ("values", values)):
        try:
            array = np.asarray(given, np.float32)
        except (TypeError, ValueError):
            raise InvalidPrefix(f"{what} of prefix {name!r} are no array of numbers") from None
        expected = spec.num_layers, spec.num_kv_heads, spec.head_dim
        if array.ndim != 4 or (*array.shape[:2], array.shape[3]) != expected:
            raise InvalidPrefix(
                f"{what} of prefix {name!r} have shape {array.shape}; the model's are [layers, KV "
                f"heads, tokens, numbers of a head]: {spec.num_layers}, {spec.num_kv_heads}, any, "
                f"{spec.head_dim}"
            )
        largest = float(jnp.finfo(cache.dtype).max)
        if not (np.abs(array) <= largest).all():
            raise InvalidPrefix(
                f"{what} of prefix {name!r} are not all finite numbers of {cache.dtype}"
            )
        arrays.append(array)
    tokens, size = arrays[0].shape[2], cache.chunk_size
    if arrays[1].shape[2] != tokens:
        raise InvalidPrefix(
            f"prefix {name!r} has keys of {tokens} tokens and values of {arrays[1].shape[2]}"
        )
    if size < LEAST_CHUNK:
        raise InvalidPrefix(f"learned prefixes need chunks of at least {LEAST_CHUNK} tokens")
    if not tokens or tokens % size:
        fitting = [str(few) for few in range(tokens, LEAST_CHUNK - 1, -1) if tokens % few == 0]
        what_fits = f", such as {', '.join(fitting[:3])}" if fitting else ""
        raise InvalidPrefix(
            f"prefix {name!r} has {tokens} virtual tokens, and chunks have {size}: a prefix is one "
            f"or more whole chunks, so the pool needs a chunk_size that divides it{what_fits}"
        )
    return arrays[0], arrays[1]


def write_missing(
    virtual: VirtualTokens, sequence: SequenceHandle, tree: PrefixTree, device: Device
) -> None:
    """Writes those of a sequence's virtual tokens that nobody has written: before any later call
    reads them."""
    size, begin = tree.chunk_size, tree.stored_tokens(sequence)
    if begin >= len(virtual.ids):
        return
    for index in range(begin // size, len(virtual.ids) // size):
        device.write_chunk(sequence.chunk_ids[index], index * size, *virtual.chunk(index))
    tree.mark_computed(sequence, len(virtual.ids))


def _in_chunks(array: np.ndarray, size: int) -> np.ndarray:
    """[L, Hkv, m, D] as contiguous [P, L, Hkv, C, D], a copy."""
    layers, heads, _, dim = array.shape
    chunks = array.reshape(layers, heads, -1, size, dim).transpose(2, 0, 1, 3, 4)
    return np.array(chunks, np.float32, order="C")


def _ids_of(keys: np.ndarray, values: np.ndarray) -> list[int]:
    """An id for each token of a chunk, made of all of the chunk; the same in all processes."""
    content = hashlib.blake2b(repr(keys.shape).encode())
    for array in (keys, values):
        content.update(array.astype("<f4").tobytes())
    bits = hashlib.shake_256(content.digest()).digest(4 * keys.shape[2])
    return (np.frombuffer(bits, "<u4") % FIRST_ID + FIRST_ID).tolist()
