"""Work items of clustered heads in plain JAX: the rows of an item begin alike, so their clusters
are the same ones, and a cluster's scores and weights are computed once for all of its heads."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention.xla_items import Run, dot, for_each_piece, merge_items, weigh
from pallas_kernels.clusters import ClusteredKV
from pallas_kernels.clusters.pairs import ClusterPairs
from pallas_kernels.online_softmax import Partial, empty, merge
from pallas_kernels.plans import WorkItems


def chunk_first_by_cluster(
    queries: Float32[Array, "B Hq D"],
    stored: ClusteredKV,
    items: WorkItems,
    attention: AttentionSpec,
) -> Partial:
    """All work items of all heads, merged into the rows they cover: Partial [B, Hq].

    Each query is its representative's already.
    """
    heads = stored.slots.heads

    def attend(some: Float32[Array, "tile Hq D"], run: Run) -> Partial:
        tile, _, head_dim = some.shape
        pairs = ClusterPairs.of(stored.representatives_of(run.chunks[run.begin]), heads)
        state = empty((heads.query_heads, tile), head_dim)  # of pairs

        def attend_piece(ids: Int32[Array, " size"], state: Partial) -> Partial:
            def attend_cluster(cluster: Int32[Array, ""], state: Partial) -> Partial:
                head = pairs.representative[cluster]
                of_cluster = lax.dynamic_index_in_dim(some, head, 1, keepdims=False)
                weights, maximum = weigh(of_cluster, stored.gather_keys(head, ids), attention)
                total = weights.sum(axis=0)

                def attend_pair(pair: Int32[Array, ""], state: Partial) -> Partial:
                    values = stored.gather_values(pairs.kv_head[pair], ids)
                    found = Partial(dot(weights, values, ((0,), (0,))), maximum, total)
                    old = Partial(*(x[pair] for x in state))
                    new = zip(state, merge(old, found), strict=True)
                    return Partial(*(x.at[pair].set(one) for x, one in new))

                begin, end = pairs.first_pair[cluster], pairs.first_pair[cluster + 1]
                return lax.fori_loop(begin, end, attend_pair, state)

            return lax.fori_loop(0, pairs.clusters, attend_cluster, state)

        state = for_each_piece(run, tile, stored.chunk_size, attend_piece, state)
        by_head = (jnp.swapaxes(x[pairs.pair_of], 0, 1) for x in state)
        return Partial(*(x.reshape(-1, *x.shape[2:]) for x in by_head))

    return merge_items(attend, queries, items)
