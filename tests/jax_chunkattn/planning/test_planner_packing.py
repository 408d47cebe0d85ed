"""Which rectangles of rows and chunks become items: small trees worked out by hand, and PAT's."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn.planning.block_table import common_runs, pad_tables
from jax_chunkattn.planning.options import PACKINGS
from jax_chunkattn.planning.packing import RULES, pack
from jax_chunkattn.planning.planner import GpuWork, PlannerOptions, plan_decode
from tests.jax_chunkattn.planning.plan_helpers import check_slots


def tree(root, *children):
    """A root of `root` chunks, with children of (rows, chunks); their rows all end there."""
    tables, fresh = [], root
    for rows, chunks in children:
        tables += [[*range(root), *range(fresh, fresh + chunks)]] * rows
        fresh += chunks
    return tables


def packed(tables, rule, **work):
    """(row_begin, row_end, column_begin, column_end) of every item."""
    table, full = pad_tables(tables, 10_000)
    blocks = pack(common_runs(table, full), RULES[rule](GpuWork(**work)))
    fields = (blocks.row_begin, blocks.row_end, blocks.column_begin, blocks.column_end)
    return sorted(tuple(map(int, block)) for block in zip(*fields, strict=True))


def test_runs_are_the_nodes_of_the_tree():
    tables = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 5], [6, 7], [6, 7], []]
    table, full = pad_tables(tables, 9)
    runs = common_runs(table, full)
    found = zip(runs.row_begin, runs.row_end, runs.column_begin, runs.column_end, strict=True)
    assert list(found) == [(0, 3, 0, 2), (0, 2, 2, 3), (0, 1, 3, 4), (2, 3, 2, 3), (3, 5, 0, 2)]


def test_pat_moves_whole_tiles_for_nothing_and_others_when_their_partials_cost_more():
    """Tiles of 4 rows, chunks of 4 tokens. The first child takes a whole tile from the root: no
    chunk is read more. The second's 3 rows save 4 * 3 tokens, and read the root again."""
    work = {"query_tile": 4, "chunk_size": 4}
    children = ((4, 3), (3, 3), (1, 3))
    # Root of 5 chunks: -20 + 12 < 0, so the second stays, and so does the third: -20 + 4.
    assert packed(tree(5, *children), "pat", **work) == [
        (0, 4, 0, 8),
        (4, 7, 5, 8),
        (4, 8, 0, 5),
        (7, 8, 5, 8),
    ]
    # Root of 3 chunks: -12 + 12 is not negative; and the last row is a tile by itself.
    assert packed(tree(3, *children), "pat", **work) == [(0, 4, 0, 6), (4, 7, 0, 6), (7, 8, 0, 6)]


def test_what_is_left_of_a_run_may_be_several_ranges():
    work = {"query_tile": 4, "chunk_size": 4}
    tables = tree(9, (2, 3), (4, 3), (2, 3))  # the second takes a whole tile
    assert packed(tables, "pat", **work) == [
        (0, 2, 0, 9),
        (0, 2, 9, 12),
        (2, 6, 0, 12),
        (6, 8, 0, 9),
        (6, 8, 9, 12),
    ]


def test_fasttree_weighs_padding_against_merging():
    """Chunks of 64 tokens, one head. 17 rows fill a query tile of 64 badly, 16 a tile of 16 wholly.

    Root of 1 chunk, first child of 1 row and 3 chunks: split K wastes 0.66 (47 * 64 + 15 * 192) and
    0.1 to merge, 3886; split Q wastes 0.33 * 64 * 16 for the 16 rows left and 0.66 * 15 * 256 for
    the child, 2872. Then the others join: their padding goes away. With 32 rows split K wastes
    0.66 * (32 * 256 + 15 * 192), split Q 0.66 * (33 * 256 + 15 * 448).
    """
    assert packed(tree(1, (1, 3), (16, 3)), "fasttree") == [(0, 1, 0, 4), (1, 17, 0, 4)]
    assert packed(tree(4, (1, 3), (31, 0)), "fasttree") == [(0, 1, 4, 7), (0, 32, 0, 4)]


def test_our_rule_reads_a_short_run_again_rather_than_merge_it():
    """A program costs about 1.5 chunk reads, a row's partial 0.05 with one query head per KV head.

    One chunk over two pairs of rows with 9 chunks each: an item of its own costs 2.7, reading it
    with each pair's own item 2. Over 16 pairs: 4 against 16. Five chunks over the two pairs: 6.7
    against 10.
    """
    joined = [(0, 2, 0, 10), (2, 4, 0, 10)]
    assert packed(tree(1, (2, 9), (2, 9)), "cost") == joined
    assert (0, 32, 0, 1) in packed(tree(1, *[(2, 9)] * 16), "cost")
    assert (0, 4, 0, 5) in packed(tree(5, (2, 9), (2, 9)), "cost")


def test_our_rule_lets_a_large_child_join_alone():
    """40 of 41 rows go on below a root of one chunk: merging their partials costs 40 * 0.05, the
    chunk read again 1. The row left keeps the root."""
    assert packed(tree(1, (1, 0), (40, 9)), "cost") == [(0, 1, 0, 1), (1, 41, 0, 10)]


def tables_of(text):
    """Block tables and lengths of a tree written as in PAT's benchmark, chunks of 64; and N."""
    nodes, tokens = (tuple(map(int, part.split(","))) for part in text.split("_"))
    rows = nodes[-1]
    path = np.concatenate(
        [
            np.repeat((np.arange(rows) * count // rows + 1000 * 1000 * level)[:, None], size, 1)
            for level, (count, size) in enumerate(zip(nodes, tokens, strict=True))
        ],
        axis=1,
    )
    length = path.shape[1]
    last = path[:, 63:length:64].astype(np.int64)  # a chunk is whose its last token is
    names = last * 10_000 + np.arange(last.shape[1])
    _, table = np.unique(names, return_inverse=True)
    table = table.reshape(last.shape)
    if length % 64:
        tails = table.max() + 1 + np.arange(rows)
        table = np.append(table, tails[:, None], axis=1)
    return list(table.astype(np.int32)), [length] * rows, int(table.max()) + 1


PAT_TREES = [
    "1,10_4096,416",
    "1,256_256,32",
    "1,1024_2048,32",
    "1,2,64_1024,256,256",
    "1,4,256_32,256,32",
    "1,8,512_32,512,256",
    "1,8,512_32,2048,256",
    "1,8,512_512,512,256",
    "1,4,8,256_32,256,256,32",
    "1,4,16,512_1024,256,128,32",
    "1,4,16,64,256,1024_256,32,256,64,32,256",
    "1,16,32,64,128,1024_256,128,64,32,32,32",
    "1,16,32,64,256,1024_256,128,64,32,32,32",
    "1,8,16,32,64,128,1024_256,128,64,32,32,32,32",
    "1,8,16,32,64,256,1024_256,128,64,32,32,32,32",
    "2,8,16,256_256,256,32,32",
    "4,16,256,512_512,32,128,32",
    "8,16,32,256_512,512,256,32",
    "256_1024",
    "256_4096",
]


@pytest.mark.parametrize("tree", PAT_TREES)
@pytest.mark.parametrize("heads", [(32, 32), (64, 8)], ids=["32/32", "64/8"])
def test_pats_trees(tree, heads):
    """All share that can, no rule reads more than every row would, and ours is estimated to be at
    most a twentieth slower than the others."""
    tables, lengths, num_chunks = tables_of(tree)
    seconds = {}
    for packing in PACKINGS:
        options = PlannerOptions.for_gpu(num_heads=heads[0], num_kv_heads=heads[1], packing=packing)
        gpu = options.gpu
        assert gpu is not None
        plan, summary = plan_decode(
            tables, lengths, chunk_size=64, num_chunks=num_chunks, options=options
        )
        assert summary.shared == ("," in tree)
        assert summary.chunk_reads <= summary.unshared_chunk_reads
        assert plan.partials is not None
        assert plan.covered_tokens[: len(lengths)].min() >= lengths[0] // 64 * 64 - 128
        check_slots(plan.items, plan.partials, len(plan.private_chunks), gpu.group, gpu.align)
        seconds[packing] = summary.seconds
    assert seconds["cost"] <= 1.05 * min(seconds.values())
