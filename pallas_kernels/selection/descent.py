"""Choosing by descent: the hierarchically pruned attention of HiP (arXiv 2406.09827, section 3.2).

The chunks that a query may choose are divided into as many equal groups as it wants chunks. In each
round every group becomes two halves, each half is worth what the chunk in its middle is, and as
many of the halves are kept as there were groups; until each holds one chunk. That looks at 2 k
log2(n / k) of n chunks instead of all, and rests on neighbours being alike: a chunk that matters
among others that do not is found only if it happens to be in the middle of a half.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.online_softmax import MASKED
from pallas_kernels.selection.asking import Asking
from pallas_kernels.selection.estimates import Estimate

STEP_CHUNKS = 256  # looked at in one step of a round, for a few queries


def descend(
    q: Float[Array, "R Hq D"],
    asking: Asking,
    estimate: Estimate,
    attention: AttentionSpec,
    first: int,
    candidates: Int32[Array, " A"],
    wanted: Int32[Array, " A"],
    *,
    most: int,
) -> Int32[Array, "A most"]:
    """The `wanted` columns, at most `most`, that each query finds among its candidates, which are
    in the columns from `first` on; P for the rest.

    The heads of a layer choose together, by the sum of their softmax over the halves of a round.
    """
    queries = attention.heads.split(q.at[asking.rows].get(mode="clip").astype(jnp.float32))
    queries = queries.transpose(1, 0, 2, 3) * attention.scale  # [Hkv, A, G, D]
    number = len(asking.rows)
    some = min(number, max(1, STEP_CHUNKS // (2 * most)))

    def worth(
        row: Int32[Array, " some"],
        column: Int32[Array, "some halves"],
        there: Bool[Array, "some halves"],
    ) -> Float32[Array, "some halves"]:
        ids = asking.tables.at[asking.table[row][:, None], column].get(mode="clip")

        def add_head(head, total):
            best = attention.cap(estimate.best(head, ids, queries[head][row]))
            best = jnp.where(there[:, :, None], best, MASKED)
            return total + jax.nn.softmax(best, axis=1).sum(axis=2)

        none = jnp.zeros(column.shape, jnp.float32)
        return jnp.where(there, lax.fori_loop(0, len(queries), add_head, none), -1)

    def find(index, columns):
        start = jnp.minimum(index * some, number - some)
        row = start + jnp.arange(some, dtype=jnp.int32)
        place = jnp.arange(most, dtype=jnp.int32)[None]
        k, n = wanted[row][:, None], jnp.maximum(candidates[row], 0)[:, None]
        kept = place < k
        divisor = jnp.maximum(k, 1)
        begin, end = (first + jnp.where(kept, i * n // divisor, 0) for i in (place, place + 1))

        def split(groups):
            begin, end = groups
            middle = (begin + end) // 2
            begins = jnp.concatenate([begin, middle], axis=1)
            ends = jnp.concatenate([middle, end], axis=1)
            there = (begins < ends) & jnp.concatenate([kept, kept], axis=1)
            _, best = lax.top_k(worth(row, (begins + ends - 1) // 2, there), most)
            return tuple(jnp.take_along_axis(x, best, axis=1) for x in (begins, ends))

        def unfinished(groups):
            begin, end = groups
            return jnp.any(kept & (end - begin > 1))

        begin, _ = lax.while_loop(unfinished, split, (begin, end))
        found = jnp.where(kept, begin, asking.columns)
        return lax.dynamic_update_slice(columns, found, (start, 0))

    columns = jnp.full((number, most), asking.columns, jnp.int32)
    return lax.fori_loop(0, lax.div(asking.count + (some - 1), jnp.int32(some)), find, columns)
