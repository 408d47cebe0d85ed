"""Cases of clustered heads to check: clusters are by chance, the same for all that begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from jax_chunkattn.planning.workloads import AttentionInputs
from pallas_kernels.clusters import ClusteredKV, HeadClusters, KeySlots
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.specs import AttentionCase

TINY = ((AttentionCase("1,3_64,8", 6, 2, 32, chunk_size=16), 3),)
ALL = (
    *TINY,
    (AttentionCase("1,32_4096,40", 16, 4, 128, dtype="bfloat16", ragged=200), 6),
    (AttentionCase("3,18_3000,9", 6, 6, 64, chunk_size=16, dtype="float16", ragged=70), 4),
    (AttentionCase("1,9_3000,64", 9, 3, 64, chunk_size=128, ragged=500, softcap=5.0), 2),
)
"""Decode problems and how many clusters query heads form."""


def cases(small: bool) -> tuple[tuple[AttentionCase, int], ...]:
    return TINY if small else ALL


def name(case: AttentionCase, count: int) -> str:
    return f"{case.name} {count} clusters"


def as_attended(case: AttentionCase) -> AttentionCase:
    """With a KV head for each query head."""
    return replace(case, num_kv_heads=case.num_heads)


@dataclass(frozen=True)
class ClusteredChunks:
    """The second layer of two of a pool, and what query heads read of both.

    Attributes:
      stored: as a kernel reads it.
      keys, values: [2, Hq, N, C, D].
    """

    stored: ClusteredKV
    keys: np.ndarray
    values: np.ndarray

    @classmethod
    def of(
        cls,
        keys: np.ndarray,
        values: np.ndarray,
        tables: Sequence[Sequence[int]],
        *,
        query_heads: int,
        count: int,
        seed: int,
    ) -> ClusteredChunks:
        """Of chunks of two layers [2, Hkv, N, C, D], which sequences have by their tables."""
        heads, num_chunks = GroupedHeads(query_heads, keys.shape[1]), keys.shape[2]
        slots = KeySlots.of(HeadClusters((count, count)), heads)
        of_chunk = _representatives(tables, num_chunks, query_heads, count, seed)
        kept = np.asarray(slots.kept(jnp.asarray(of_chunk)))
        head_slots = np.asarray(slots.of_heads(jnp.asarray(of_chunk))).astype(np.uint8)

        def keys_of(readers: np.ndarray) -> np.ndarray:
            """Of the heads that these query heads of each chunk [N, H] read: [2, H, N, C, D]."""
            return keys[:, readers.T // heads.group, np.arange(num_chunks)[None]]

        stored = ClusteredKV(
            jnp.asarray(keys_of(kept).reshape(slots.total, *keys.shape[2:])),
            jnp.asarray(values),
            jnp.asarray(np.stack([of_chunk.astype(np.uint8)] * 2)),
            jnp.asarray(np.stack([head_slots] * 2)),
            jnp.int32(1),
            slots,
        )
        return cls(stored, keys_of(of_chunk), np.repeat(values, heads.group, axis=1))

    @classmethod
    def of_inputs(
        cls, case: AttentionCase, count: int, inputs: AttentionInputs, seed: int
    ) -> ClusteredChunks:
        """Of a decode problem."""
        how = {"query_heads": case.num_heads, "count": count, "seed": seed}
        return cls.of(inputs.keys, inputs.values, inputs.tables, **how)


def _representatives(
    tables: Sequence[Sequence[int]], num_chunks: int, query_heads: int, count: int, seed: int
) -> np.ndarray:
    """Of each chunk [N, Hq]: those of all that begin with the same one."""
    random = np.random.default_rng(seed)
    found = np.zeros((num_chunks, query_heads), np.int32)
    of_first: dict[int, np.ndarray] = {}
    for table in tables:
        if table[0] not in of_first:
            label = random.permutation(query_heads) % count
            last = [int(np.flatnonzero(label == one)[-1]) for one in range(count)]
            of_first[table[0]] = np.array(last, np.int32)[label]
        found[list(table)] = of_first[table[0]]
    return found
