"""Batches for the planner, and what must be true of any plan. Chunks hold 4 tokens."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from jax_chunkattn.planning.planner import PlannerOptions
from jax_chunkattn.tree.prefix_tree import PrefixTree
from pallas_kernels import DecodePlan
from pallas_kernels.chunk_attention.reference import times_read
from pallas_kernels.plans import DecodeReads
from pallas_kernels.windows import Window

SHARE_ALL = PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)
CHUNK = 4
POOL = 400


@st.composite
def batches(draw):
    """Block tables and lengths as a prefix tree hands them out, some rows with reserved chunks."""
    alphabet = st.integers(0, 1)
    prompts = draw(st.lists(st.lists(alphabet, min_size=1, max_size=30), min_size=1, max_size=12))
    tree = PrefixTree(POOL, CHUNK)
    for prompt in prompts:
        sequence = tree.insert(prompt)
        tree.reserve(sequence, draw(st.integers(0, 9)))
    rows = tree.rows()
    form = draw(st.sampled_from(["chunk_ids", "chunk_table"]))
    tables = [getattr(row, form) for row in rows]
    return tables, [row.num_tokens for row in rows]


def items_of(plan: DecodePlan) -> list[tuple[int, int, tuple[int, ...]]]:
    """(row_begin, row_count, chunks) of every work item."""
    items = plan.items
    arrays = (items.row_begin, items.row_count, items.chunk_begin, items.chunk_count)
    return [
        (int(row), int(rows), tuple(items.chunks[begin : begin + size].tolist()))
        for row, rows, begin, size in zip(*arrays, strict=True)
    ][: int(items.count)]


def check_coverage(plan: DecodePlan, tables, lengths) -> None:
    """Every row attends to each of its tokens once, and `covered_tokens` counts those of items."""
    check_reads(plan, tables, lengths)
    covered = np.zeros(plan.private_chunks.shape[0], int)
    for row, rows, chunks in items_of(plan):
        assert rows > 0
        assert len(chunks) > 0
        covered[row : row + rows] += len(chunks) * CHUNK
    np.testing.assert_array_equal(plan.covered_tokens, covered)


def check_reads(plan: DecodePlan, tables, lengths, window: Window | None = None) -> None:
    """Every row's query, its last token, attends to each token that it sees once."""
    padded = np.zeros(plan.private_chunks.shape[0], np.int32)
    padded[: len(lengths)] = lengths
    expected = np.zeros((len(padded), POOL, CHUNK), int)
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        for position in range(length):
            if window is None or position < window.sinks or position >= length - window.size:
                expected[row, table[position // CHUNK], position % CHUNK] += 1
    np.testing.assert_array_equal(times_read(DecodeReads(plan, padded), POOL, CHUNK), expected)


def check_slots(items, partials, num_rows: int, group: int, align: int) -> None:
    """Each (item, row) pair has a slot of its own, found from either side, and what an item may
    overwrite, its flattened rows up to a multiple of `align`, is nobody else's."""
    pairs = []
    written: list[tuple[int, int]] = []
    for item in range(int(items.count)):
        first, count = int(partials.item_slot[item]), int(items.row_count[item])
        begin = int(items.row_begin[item])
        pairs += [(begin + row, first + row) for row in range(count)]
        flattened = -(-count * group // align) * align
        written.append((first * group, first * group + flattened))
    written.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(written))
    assert all(end <= len(partials.slots) * group for _, end in written)
    assert partials.row_begin.shape == (num_rows + 1,)
    assert partials.row_begin[0] == 0
    found = [
        (row, int(slot))
        for row in range(num_rows)
        for slot in partials.slots[partials.row_begin[row] : partials.row_begin[row + 1]]
    ]
    assert sorted(found) == sorted(pairs)
    assert len({slot for _, slot in found}) == len(found)
