from __future__ import annotations

import numpy as np

from jax_chunkattn.planning.block_table import Blocks, covered_mask, in_order
from jax_chunkattn.planning.planner import PlannerOptions, plan_decode

READ = np.ones((4, 6), bool)


def kept(blocks, read=READ):
    return list(zip(*vars(in_order(Blocks.of(blocks), read)).values(), strict=True))


def test_blocks_behind_a_gap_of_one_of_their_rows_are_none():
    first, second, deep = (0, 0, 4, 2), (0, 2, 2, 4), (0, 4, 2, 5)
    assert kept([first, second, deep]) == [first, second, deep]
    assert kept([first, deep]) == [first]
    assert kept([second, deep]) == []
    # What rows 2 and 3 alone leave out stops the others too, from there on.
    assert kept([(0, 0, 2, 1), (0, 1, 4, 2), second]) == [(0, 0, 2, 1)]


def test_what_is_not_read_is_no_gap():
    read = READ.copy()
    read[:, 0] = False
    assert kept([(0, 1, 4, 2)], read) == [(0, 1, 4, 2)]
    read[3, 0] = True
    assert kept([(0, 1, 4, 2)], read) == []


def test_random_blocks_are_those_that_a_row_reads_first():
    rng = np.random.default_rng(0)
    for _ in range(50):
        blocks = [(row, column, row + 1, column + 1) for row in range(5) for column in range(7)]
        some = [block for block in blocks if rng.random() < 0.7]
        read = rng.random((5, 7)) < 0.8
        covered = covered_mask(read.shape, Blocks.of(some))
        expected = [
            (row, column, *rest)
            for row, column, *rest in some
            if (covered | ~read)[row, : column + 1].all()
        ]
        assert kept(some, read) == expected


def test_plans_in_order_share_no_run_behind_one_that_is_not_shared():
    tables = [[0, 1, 2, 3 + row] for row in range(4)]
    tables = [[*(table[:1]), 10 + row // 2, *table[2:]] for row, table in enumerate(tables)]
    lengths = [16 * 3 + 5] * 4

    def pairs(rows, chunks):
        return rows == 2

    def covered(planner):
        plan, _ = plan_decode(tables, lengths, chunk_size=16, num_chunks=20, options=planner)
        return plan.covered_tokens[:4].tolist()

    assert covered(PlannerOptions.for_native(in_order=True)) == [48] * 4
    assert covered(PlannerOptions(in_order=True, worth_sharing=pairs)) == [0] * 4
    assert any(covered(PlannerOptions(worth_sharing=pairs)))
