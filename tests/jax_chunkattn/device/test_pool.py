"""The pool of chunks as they are."""

from __future__ import annotations

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_chunkattn import CacheConfig, allocate_pool, chunk_attention, plan_decode
from jax_chunkattn.device.decode_loop import decode_attend
from jax_chunkattn.device.decode_rows import DecodeRows
from tests.jax_chunkattn.engine.engines import SHARE_ALL
from tests.jax_chunkattn.toy import toy_model

pytestmark = pytest.mark.optimised

OPERATION = re.compile(r"^\s*(?:ROOT )?%?\S+ = .*? ([a-z][\w-]*)\(", re.MULTILINE)


@pytest.mark.slow
def test_that_chunks_might_be_encoded_costs_the_decode_loop_nothing():
    """Operations and bytes of the compiled loop, against one that knows nothing of codecs: it
    writes to two arrays, and attends to them by the public function."""
    model = toy_model()
    spec = model.cache_spec
    tables, lengths = [[0, 1], [0, 2]], np.array([20, 27], np.int32)
    plan, _ = plan_decode(tables, lengths.tolist(), chunk_size=16, num_chunks=8, options=SHARE_ALL)
    pool = allocate_pool(spec, CacheConfig(8, 16))
    slots, active = np.arange(2, dtype=np.int32), np.ones(2, bool)

    def plain_attend(rows):
        def attend(pool, layer, q, k, v):
            chunks, offsets = rows.place(8, 16)
            keys, values = (
                array.at[layer, :, chunks, offsets].set(new, mode="drop", unique_indices=True)
                for array, new in zip(pool, (k, jnp.nan_to_num(v)), strict=True)
            )
            seen = jnp.where(rows.active, rows.lengths + 1, 0)
            how = {"scale": spec.scale, "softcap": spec.softcap, "implementation": "xla"}
            return chunk_attention(q, keys, values, rows.plan, seen, layer=layer, **how), (
                keys,
                values,
            )

        return attend

    def loop(attend_of, sealed, pool, lengths):
        def step(carry, _):
            pool, tokens, lengths = carry
            rows = DecodeRows(plan, jnp.asarray(slots), lengths, jnp.asarray(active))
            hidden, pool = model(tokens, lengths, pool, attend_of(rows))
            tokens = jnp.argmax(model.logits(hidden), axis=-1).astype(jnp.int32)
            return (sealed(pool, rows), tokens, lengths + 1), tokens

        (pool, _, _), tokens = lax.scan(step, (pool, jnp.zeros(2, jnp.int32), lengths), length=4)
        return pool, tokens

    programs = [
        jax.jit(loop, static_argnums=(0, 1), donate_argnums=2).lower(*how, lengths).compile()
        for how in (
            (plain_attend, lambda pool, rows: pool, (pool.keys, pool.values)),
            (
                lambda rows: decode_attend(spec, pool, rows, "xla"),
                lambda pool, rows: pool.seal(rows),
                pool,
            ),
        )
    ]
    plain, ours = (Counter(OPERATION.findall(program.as_text() or "")) for program in programs)
    assert sum(plain.values()) > 100
    assert ours == plain
    costs = [program.cost_analysis() for program in programs]
    for what in ("bytes accessed", "flops"):
        theirs, own = (cost[what] for cost in costs if cost is not None)
        assert own == theirs > 0
