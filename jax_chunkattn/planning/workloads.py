"""Attention cases made real: token trees, their plan, and a pool with random contents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int32

from jax_chunkattn.planning.planner import PlannerOptions, PlanSummary, plan_decode
from jax_chunkattn.tree.prefix_tree import PrefixTree
from pallas_kernels.plans import DecodePlan
from pallas_kernels.specs import AttentionCase


@dataclass(frozen=True)
class AttentionInputs:
    """Operands of `chunk_attention` for one case, as NumPy arrays.

    The plan has its rows padded to a power of two, and so have `q` and `lengths`; `tables[b]` lists
    the chunks of row `b`, for the real rows only.
    """

    q: Float[np.ndarray, "B Hq D"]
    keys: Float[np.ndarray, "L Hkv N C D"]
    values: Float[np.ndarray, "L Hkv N C D"]
    lengths: Int32[np.ndarray, " B"]
    tables: list[list[int]]
    plan: DecodePlan
    summary: PlanSummary


def case_prompts(case: AttentionCase, seed: int = 0) -> list[list[int]]:
    """The token ids of every row: equal along shared nodes, different elsewhere."""
    random = np.random.default_rng(seed)
    fresh = iter(range(1, 2**31))

    def tokens(count: int) -> list[int]:
        return [next(fresh) for _ in range(count)]

    prompts: list[list[int]] = [[] for _ in range(case.batch)]
    for nodes, length in zip(case.nodes_per_level, case.tokens_per_level, strict=True):
        levels = [tokens(length) for _ in range(nodes)]
        for row, prompt in enumerate(prompts):
            prompt.extend(levels[row * nodes // case.batch])
    for prompt in prompts:
        prompt.extend(tokens(int(random.integers(0, case.ragged + 1))))
    return prompts


def case_inputs(
    case: AttentionCase,
    *,
    options: PlannerOptions = PlannerOptions(),
    layers: int = 1,
    seed: int = 0,
) -> AttentionInputs:
    """Inserts the case's prompts into a prefix tree and plans them over a pool of random chunks.

    The pool has a few chunks to spare, and chunk ids are shuffled, so that neighbours in a sequence
    are not neighbours in memory.
    """
    random = np.random.default_rng(seed)
    prompts = case_prompts(case, seed)
    most = sum(-(-len(prompt) // case.chunk_size) for prompt in prompts)
    tree = PrefixTree(most, case.chunk_size)
    for prompt in prompts:
        tree.insert(prompt)
    num_chunks = tree.in_use_count + 3
    place = random.permutation(num_chunks)
    rows = tree.rows()
    used = sorted({chunk for row in rows for chunk in row.chunk_ids})
    renamed = {chunk: int(place[index]) for index, chunk in enumerate(used)}
    tables = [[renamed[chunk] for chunk in row.chunk_ids] for row in rows]
    plan, summary = plan_decode(
        tables,
        [row.num_tokens for row in rows],
        chunk_size=case.chunk_size,
        num_chunks=num_chunks,
        options=options,
    )
    batch = plan.num_rows
    lengths = np.zeros(batch, np.int32)
    lengths[: len(rows)] = [row.num_tokens for row in rows]
    pool_shape = (layers, case.num_kv_heads, num_chunks, case.chunk_size, case.head_dim)

    def normal(shape):
        return random.standard_normal(shape, np.float32).astype(case.dtype, copy=False)

    return AttentionInputs(
        q=normal((batch, case.num_heads, case.head_dim)),
        keys=normal(pool_shape),
        values=normal(pool_shape),
        lengths=lengths,
        tables=tables,
        plan=plan,
        summary=summary,
    )
