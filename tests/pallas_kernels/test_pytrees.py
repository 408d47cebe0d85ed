from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxtyping import TypeCheckError

from pallas_kernels.plans import DecodePlan, WorkItems

IDS, ROWS = np.arange(4, dtype=np.int32), np.arange(3, dtype=np.int32)
ITEMS = WorkItems(ROWS, ROWS, ROWS, ROWS, IDS, np.array(1, np.int32))
PLAN = DecodePlan(ITEMS, IDS[:, None], IDS)


@pytest.mark.parametrize("leaf", [jax.ShapeDtypeStruct((7,), "float32"), PartitionSpec(), "text"])
def test_a_tree_holds_whatever_takes_the_place_of_an_array(leaf):
    mapped = jax.tree.map(lambda _: leaf, PLAN)
    assert dataclasses.astuple(mapped) == (
        (*(leaf,) * 6, None),
        leaf,
        leaf,
        *(None,) * 4,
    )


def test_leaves_are_named_by_their_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(PLAN)]
    assert paths[-3:] == [".items.count", ".private_chunks", ".covered_tokens"]
    assert len(paths) == 8


def test_a_tree_is_taken_apart_without_python():
    """JAX loses one level of recursion for good wherever an interrupt comes while Python flattens:
    after a thousand of them nothing runs any more."""
    entered = []
    sys.setprofile(lambda frame, event, _: entered.append(frame) if event == "call" else None)
    leaves, structure = jax.tree_util.default_registry.flatten(PLAN, None)
    sys.setprofile(None)
    assert len(leaves) == structure.num_leaves == 8
    assert not entered


@pytest.mark.parametrize("wrong", [ROWS[:2], ROWS.astype(np.int64), ROWS[:, None], None])
def test_a_field_of_another_shape_or_dtype_is_refused(wrong):
    with pytest.raises(TypeCheckError, match="chunk_count"):
        dataclasses.replace(ITEMS, chunk_count=wrong)
