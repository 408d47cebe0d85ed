"""The baselines compute the same attention as the float64 oracle."""

from __future__ import annotations

import dataclasses
import importlib.util

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.baselines import (
    NotUniform,
    cascade,
    cascade_attention,
    cascade_levels,
    dense_attention,
    dense_copies,
    exact_attention,
    jax_dot_product_attention,
    pad_tables,
    paged_attention,
    pool_of_copies,
    torch_attention,
    torch_missing,
)
from jax_chunkattn.planning.workloads import AttentionInputs, case_inputs
from pallas_kernels.specs import NUMERICS, AttentionCase
from tests import oracle

LAYERS = 2
FORKED = NUMERICS[7]
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 2e-3}


def dense_operands(inputs: AttentionInputs):
    rows = len(inputs.tables)
    keys, values = (
        dense_copies(jnp.asarray(pool), inputs.tables, layer=LAYERS - 1)
        for pool in (inputs.keys, inputs.values)
    )
    return jnp.asarray(inputs.q[:rows]), keys, values, inputs.lengths[:rows]


def dense(inputs: AttentionInputs):
    return dense_attention(*dense_operands(inputs))


def jax_dpa(inputs: AttentionInputs):
    return jax_dot_product_attention(*dense_operands(inputs))


def torch_sdpa(inputs: AttentionInputs):
    pytest.importorskip("torch")
    return torch_attention(*dense_operands(inputs))().astype(inputs.q.dtype)


def cascaded(inputs: AttentionInputs):
    pool = jnp.asarray(inputs.keys), jnp.asarray(inputs.values)
    levels = cascade_levels(*pool, inputs.tables, inputs.lengths.tolist(), layer=LAYERS - 1)
    return cascade_attention(jnp.asarray(inputs.q[: len(inputs.tables)]), levels)


def paged(inputs: AttentionInputs):
    keys, values, tables = pool_of_copies(
        jnp.asarray(inputs.keys), jnp.asarray(inputs.values), inputs.tables
    )
    copies = {"keys": np.asarray(keys), "values": np.asarray(values), "tables": tables}
    return paged_shared_pages(dataclasses.replace(inputs, **copies))


def paged_shared_pages(inputs: AttentionInputs):
    rows = len(inputs.tables)
    tables, lengths = pad_tables(inputs.tables), inputs.lengths[:rows]
    pool = inputs.keys, inputs.values
    return paged_attention(inputs.q[:rows], *pool, tables, lengths, layer=LAYERS - 1)


baselines = pytest.mark.parametrize(
    "baseline",
    [dense, paged, paged_shared_pages, cascaded, jax_dpa, torch_sdpa],
    ids=lambda baseline: baseline.__name__,
)


def exact(inputs: AttentionInputs, **scores: float) -> np.ndarray:
    pools = inputs.keys[-1], inputs.values[-1]
    rows = len(inputs.tables)
    return oracle.decode_attention(inputs.q, *pools, inputs.tables, inputs.lengths, **scores)[:rows]


def assert_exact(got, inputs: AttentionInputs) -> None:
    assert got.dtype == inputs.q.dtype
    tolerance = TOLERANCE[inputs.q.dtype.name]
    chex.assert_trees_all_close(np.asarray(got, np.float64), exact(inputs), rtol=0, atol=tolerance)


@baselines
@pytest.mark.parametrize(
    "case", [NUMERICS[0], NUMERICS[2], *NUMERICS[6:8], NUMERICS[9]], ids=lambda case: case.name
)
def test_agrees_with_float64(case: AttentionCase, baseline):
    inputs = case_inputs(case, layers=LAYERS)
    assert_exact(baseline(inputs), inputs)


@baselines
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_accumulates_in_float32(dtype: str, baseline):
    if (baseline, dtype) == (jax_dpa, "float16"):
        pytest.skip("XLA has no such matrix product on a CPU")
    inputs = case_inputs(dataclasses.replace(FORKED, dtype=dtype), layers=LAYERS)
    assert_exact(baseline(inputs), inputs)


@baselines
def test_pairs_that_do_not_fill_the_last_step(baseline, monkeypatch: pytest.MonkeyPatch):
    case = AttentionCase("1,3_64,5", 5, 5, 8, chunk_size=16, ragged=30)
    inputs = case_inputs(case, layers=LAYERS)
    width = max(map(len, inputs.tables)) * case.chunk_size * case.head_dim
    monkeypatch.setattr("experiments.baselines.dense.STEP_BYTES", 4 * 2 * 4 * width)
    assert_exact(baseline(inputs), inputs)


def test_queries_of_a_node_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cascade, "MOST_SCORES", 40)
    inputs = case_inputs(AttentionCase("1,2,6_32,48,17", 6, 2, 8, chunk_size=16), layers=LAYERS)
    assert_exact(cascaded(inputs), inputs)


@pytest.mark.parametrize(
    ("tree", "levels"),
    [
        ("1,2,6_32,48,17", [(1, 32), (2, 48), (6, 17)]),
        ("1,4_40,20", [(1, 32), (4, 28)]),  # a chunk that ends below a node is nobody else's
        ("1,3_32,0", [(1, 32)]),
        ("5_16", [(5, 16)]),
    ],
)
def test_levels_are_those_that_the_block_tables_share(tree: str, levels: list[tuple[int, int]]):
    inputs = case_inputs(AttentionCase(tree, 2, 2, 8, chunk_size=16))
    pool = jnp.asarray(inputs.keys), jnp.asarray(inputs.values)
    found = cascade_levels(*pool, inputs.tables, inputs.lengths.tolist())
    assert [(level.keys.shape[0], level.keys.shape[2]) for level in found] == levels
    assert all(level.lengths is None for level in found)


@pytest.mark.parametrize(
    "tables",
    [
        [[0, 1], [0, 2], [3, 4]],
        [[0, 1], [0, 2], [0, 2], [0, 3]],
        [[0], [1, 2], [1, 2]],
    ],
)
def test_a_cascade_needs_uniform_levels(tables: list[list[int]]):
    pool = jnp.zeros((1, 1, 5, 16, 8))
    lengths = [16 * len(table) for table in tables]
    with pytest.raises(NotUniform):
        cascade_levels(pool, pool, tables, lengths)


def test_torch_is_asked_for_by_name_where_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install torch" in (torch_missing() or "")


@baselines
def test_what_lies_beyond_a_row_is_not_read(baseline):
    inputs = case_inputs(FORKED, layers=LAYERS)
    expected = baseline(inputs)
    rows = len(inputs.tables)
    for row, length in enumerate(inputs.lengths[:rows]):
        chunk, offset = inputs.tables[row][-1], length % FORKED.chunk_size
        if offset:
            inputs.keys[:, :, chunk, offset:] = inputs.values[:, :, chunk, offset:] = 1e4
    np.testing.assert_array_equal(baseline(inputs), expected)


def test_no_two_rows_have_a_copied_chunk_in_common():
    inputs = case_inputs(FORKED, layers=LAYERS)
    keys, values, tables = pool_of_copies(
        jnp.asarray(inputs.keys), jnp.asarray(inputs.values), inputs.tables
    )
    used = [chunk for table in tables for chunk in table]
    assert sorted(used) == list(range(keys.shape[2])) == list(range(values.shape[2]))
    assert used != sorted(used)
    for table, source in zip(tables, inputs.tables, strict=True):
        np.testing.assert_array_equal(keys[:, :, np.array(table)], inputs.keys[:, :, source])


def test_scale_replaces_the_default():
    inputs = case_inputs(FORKED)
    rows = len(inputs.tables)
    args = (inputs.keys, inputs.values, pad_tables(inputs.tables), inputs.lengths[:rows])
    scaled = paged_attention(2 * inputs.q[:rows], *args)
    given = paged_attention(inputs.q[:rows], *args, scale=2 * FORKED.head_dim**-0.5)
    chex.assert_trees_all_close(scaled, given, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scores", [{}, {"scale": 1.0, "softcap": 3.0}])
def test_exact_attention_is_the_oracle_of_some_rows_and_heads(scores: dict[str, float]):
    inputs = case_inputs(FORKED, layers=LAYERS)
    rows, kv_heads = [0, 3, 15], [1, 0]
    arrays = inputs.q, inputs.keys, inputs.values, inputs.tables, inputs.lengths.tolist()
    got = exact_attention(*arrays, rows=rows, kv_heads=kv_heads, layer=LAYERS - 1, **scores)
    shape = (len(inputs.tables), FORKED.num_kv_heads, -1, FORKED.head_dim)
    grouped = exact(inputs, **scores).reshape(shape)
    chex.assert_trees_all_close(got, grouped[np.ix_(rows, kv_heads)], rtol=0, atol=1e-12)
