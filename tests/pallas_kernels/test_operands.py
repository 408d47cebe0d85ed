"""The operands that every implementation of attention takes, and what is refused about them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.chunk_attention import CHUNK_ATTENTION, xla_items
from pallas_kernels.coded_kv import HeadKV
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.plans import DecodeReads
from pallas_kernels.specs import AttentionCase
from pallas_kernels.stored_kv import StoredKV

INPUTS = case_inputs(AttentionCase("1,4_96,16", 4, 2, 16, chunk_size=16))
Q = jnp.asarray(INPUTS.q)
STORED = StoredKV(jnp.asarray(INPUTS.keys), jnp.asarray(INPUTS.values), 0)
READS = DecodeReads(INPUTS.plan, INPUTS.lengths)


def test_grouped_heads_are_query_heads_by_the_kv_head_they_read():
    heads = GroupedHeads(6, 2)
    assert heads.group == 3
    q = jnp.broadcast_to(jnp.arange(6.0)[None, :, None], (5, 6, 4))
    split = heads.split(q)
    np.testing.assert_array_equal(split[0, :, :, 0], [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(heads.join(split), q)


def test_chunks_are_read_as_they_were_written():
    k = jnp.arange(2 * 2 * 16, dtype=jnp.float32).reshape(2, 2, 16)
    slots = np.array([3, 3], np.int32), np.array([0, 15], np.int32)
    keys, values = HeadKV(STORED.write(k, -k, *slots), jnp.int32(1)).gather(np.array([3], np.int32))
    np.testing.assert_array_equal(keys[np.array([0, 15])], k[:, 1])
    np.testing.assert_array_equal(values[np.array([0, 15])], -k[:, 1])


@pytest.mark.parametrize("sizes", [(8, 2, 16), (4, 4, 16), (4, 2, 8)])
def test_operands_that_are_not_the_attentions_are_refused(sizes):
    attention = AttentionSpec.of(*sizes)
    with pytest.raises(ValueError, match=r"4 query heads and 2 KV heads|head_dim 8"):
        CHUNK_ATTENTION.attend(Q[..., : sizes[-1]], STORED, READS, attention)


def test_types_are_checked_inside_the_implementations():
    kv, attention = HeadKV(STORED, jnp.int32(0)), AttentionSpec.of(4, 2, 16)
    run = xla_items.Run(jnp.zeros(4, jnp.int32), jnp.int32(0), jnp.int32(1))
    for wrong in (Q, Q[0].astype(jnp.float16), None):
        with pytest.raises(TypeCheckError, match="queries"):
            xla_items.attend_run(wrong, kv, run, attention)  # pyright: ignore[reportArgumentType]
    xla_items.attend_run(Q[0], kv, run, attention)
