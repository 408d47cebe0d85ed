"""Packing for GPUs: which rectangles of rows and chunks become work items.

An item is a range of rows with all the chunks they read from a column on, so the runs of the tree
can be items as they are, or a run may be *joined* by some of the runs below it: the item of such a
child begins where its parent's does, its rows read the parent's chunks themselves, and merge one
partial less. A *rule* decides, run by run from the root down, which children join. They differ in
what they think a joined child costs; the published ones are PAT's and FastTree's.

The rows that a run keeps when children have joined may be several ranges; each becomes an item of
its own, because an item's rows are neighbours here. PAT and FastTree allow any set of rows, and
their rules are applied as published, to the number of rows that is left.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from jax_chunkattn.planning.block_table import Blocks
from jax_chunkattn.planning.options import GpuWork, WorthSharing

Run = tuple[int, int, int]  # row_begin, row_end, chunks that its item would read
Rule = Callable[[Run, list[Run]], list[bool]]  # a run, those right below it -> which of them join


def pack(runs: Blocks, rule: Rule) -> Blocks:
    """Blocks that cover what `runs`, in depth-first order, cover, with children joined by `rule`.

    Only a run with children is put to the rule.
    """
    rows_begin, rows_end = runs.row_begin.tolist(), runs.row_end.tolist()
    begins, ends = runs.column_begin.tolist(), runs.column_end.tolist()
    blocks = []
    families = _families(rows_begin, rows_end)
    for run, children in families.items():
        row, begin, end = rows_begin[run], begins[run], ends[run]
        below = [(rows_begin[kid], rows_end[kid], ends[kid] - begins[kid]) for kid in children]
        joins = rule((row, rows_end[run], end - begin), below)
        for kid in itertools.compress(children, joins):
            begins[kid] = begin
            if row < rows_begin[kid]:
                blocks.append((row, begin, rows_begin[kid], end))
            row = rows_end[kid]
        if row < rows_end[run]:
            blocks.append((row, begin, rows_end[run], end))
    leaves = np.ones(len(runs), bool)
    leaves[list(families)] = False
    kept = Blocks.of(blocks)
    ends_of_rows = replace(runs, column_begin=np.array(begins, np.int64))[leaves]
    return Blocks(*map(np.append, vars(kept).values(), vars(ends_of_rows).values()))


def pat(gpu: GpuWork) -> Rule:
    """PAT's rule (ASPLOS 2026).

    Let a run of Lp tokens have S rows, a child of Lc tokens s of them, and a query tile m rows. A
    tile reads what its item holds, so apart they read `ceil(S/m) Lp + ceil(s/m) Lc` tokens. With
    the child joined the parent's item has S - s rows left and the child's reads both:
    `ceil((S-s)/m) Lp + ceil(s/m) (Lp + Lc)`. The difference, `(ceil(S/m) - ceil((S-s)/m) -
    ceil(s/m)) Lp`, is 0 when whole tiles move and negative otherwise: the parent is read again.
    Against it stands one partial less for each of the s rows; PAT counts writing and reading one as
    4 tokens. The child joins when the sum of both is not negative.
    """
    tile, size, private = gpu.tile_rows, gpu.chunk_size, gpu.max_private_chunks

    def rule(run: Run, children: list[Run]) -> list[bool]:
        left, tokens = run[1] - run[0], run[2] * size
        before = -(-left // tile)
        joins = []
        for row, end, chunks in children:
            rows = end - row
            after = -(-(left - rows) // tile)
            again = (before - after + (-rows // tile)) * tokens
            joined = again + 4 * rows >= 0 and (rows > 1 or chunks > private)
            joins.append(joined)
            if joined:
                left, before = left - rows, after
        return joins

    return rule


def fasttree(gpu: GpuWork) -> Rule:
    """FastTree's rule (Pan et al., MLSys 2025): greedy, from the root down.

    An item of n_q rows and n_k tokens wastes `0.66 pad_q G n_k + 0.33 pad_k n_q G`, where pad_q and
    pad_k fill up its last query tile and its only KV tile: 64 by 32 for more than 16 rows, else 16
    by 128. A child that is an item of its own ("split K") adds 0.1 for every row that merges one
    more partial; one that joins ("split Q") takes its rows out of the parent's item. It joins when
    that is cheaper.
    """
    group, size, private = gpu.group, gpu.chunk_size, gpu.max_private_chunks

    @functools.cache
    def waste(rows: int, tokens: int) -> float:
        query_tile, kv_tile = (64, 32) if rows > 16 else (16, 128)
        pad_q, pad_k = -rows % query_tile, max(0, kv_tile - tokens)
        return group * (0.66 * pad_q * tokens + 0.33 * pad_k * rows)

    def rule(run: Run, children: list[Run]) -> list[bool]:
        left, tokens = run[1] - run[0], run[2] * size
        kept = waste(left, tokens)
        joins = []
        for row, end, chunks in children:
            rows, own = end - row, chunks * size
            without = waste(left - rows, tokens)
            split_k = kept + waste(rows, own) + 0.1 * rows
            split_q = without + waste(rows, own + tokens)
            joined = split_k > split_q and (rows > 1 or chunks > private)
            joins.append(joined)
            if joined:
                left, kept = left - rows, without
        return joins

    return rule


def by_cost(gpu: GpuWork) -> Rule:
    """Our rule: the least work, in chunk reads, of three ways to treat a run.

    An item costs, for each of its tiles, the program's overhead and its chunks, and for each row a
    partial. Either no child joins; or those join whose partials cost more than reading the run
    again; or all do, and the run has no item. In the last case a row that has little below may read
    the run in the sequence-first phase, without an item.
    """
    overhead, most = gpu.program_cost, gpu.max_private_chunks
    partial, tile = gpu.partial_write_cost + gpu.partial_read_cost, gpu.tile_rows

    def item(rows: int, chunks: int) -> float:
        return -(-rows // tile) * (overhead + chunks) + rows * partial

    def alone(rows: int, chunks: int) -> float:
        return min(rows * chunks, item(rows, chunks)) if chunks <= most else item(rows, chunks)

    def rule(run: Run, children: list[Run]) -> list[bool]:
        chunks = run[2]
        apart = item(run[1] - run[0], chunks)
        if chunks > partial * tile and chunks * len(children) >= apart:
            return [False] * len(children)  # whichever join, they read more than they save
        again, pays = [], []  # what each child adds when it joins; whether its partials cost more
        for row, end, own in children:
            rows = end - row
            more = -(-rows // tile) * chunks
            private = rows == 1 and own <= most  # no item, and no partial to save
            if private and own + chunks > most:
                more += overhead + partial
            again.append(more)
            pays.append(not private and rows * partial >= more)
        ways = [(apart, [False] * len(children))]
        if any(pays):
            cost = sum(item(rows, chunks) for rows in _left(run, children, pays))
            ways.append((cost + sum(np.compress(pays, again)), pays))
        everyone = [True] * len(children)
        cost = sum(alone(rows, chunks) for rows in _left(run, children, everyone))
        ways.append((cost + sum(again), everyone))
        return min(ways, key=lambda way: way[0])[1]

    return rule


def when_worth(worth: WorthSharing) -> Rule:
    """A run is an item as it is, or not at all: all children join."""

    def rule(run: Run, children: list[Run]) -> list[bool]:
        keeps = worth(np.array([run[1] - run[0]]), np.array([run[2]]))[0]
        return [not keeps] * len(children)

    return rule


RULES: dict[str, Callable[[GpuWork], Rule]] = {"cost": by_cost, "fasttree": fasttree, "pat": pat}


def without_private(
    blocks: Blocks,
    full: np.ndarray,
    gpu: GpuWork,
    *,
    several: bool = False,
    anywhere: bool = False,
) -> Blocks:
    """The blocks that are items: less the short ends of rows, which stay in the sequence-first
    phase. With `several`, ends that several rows have in common stay there too, if reading them row
    by row costs less than an item; with `anywhere`, what is short stays wherever it is."""
    ends = np.stack([blocks.row_begin, blocks.row_end], axis=1).ravel()
    last_column = np.maximum.reduceat(np.append(full, 0), ends)[::2] if len(ends) else ends
    short = blocks.columns <= gpu.max_private_chunks
    if not anywhere:
        short &= blocks.column_end == last_column
    stays = blocks.rows == 1
    if several:
        stays |= ~costs_more_by_rows(blocks, gpu)
    return blocks[~(short & stays)]


def costs_more_by_rows(blocks: Blocks, gpu: GpuWork) -> np.ndarray:
    """Of each block, whether reading it row by row costs more than an item."""
    partials = (gpu.partial_write_cost + gpu.partial_read_cost) * blocks.rows
    programs = -(-blocks.rows // gpu.tile_rows) * (gpu.program_cost + blocks.columns)
    return blocks.rows * blocks.columns > programs + partials


def single_rows(full: np.ndarray) -> Blocks:
    """All full chunks of each row as a block."""
    rows = np.arange(len(full))
    blocks = Blocks(rows, np.zeros_like(rows), rows + 1, full.astype(np.int64))
    return blocks[full > 0]


def split_rows(blocks: Blocks, which: np.ndarray) -> Blocks:
    """The blocks, those in `which` with every row by itself."""
    number = np.where(which, blocks.rows, 1)
    item = np.repeat(np.arange(len(blocks)), number)
    row = (
        blocks.row_begin[item] + np.arange(len(item)) - np.repeat(number.cumsum() - number, number)
    )
    row_end = np.where(which[item], row + 1, blocks.row_end[item])
    return Blocks(row, blocks.column_begin[item], row_end, blocks.column_end[item])


def _families(rows_begin: list[int], rows_end: list[int]) -> dict[int, list[int]]:
    """The runs that have runs below them, parents first, each with those right below it."""
    families: dict[int, list[int]] = {}
    path: list[int] = []
    for run, (row, end) in enumerate(zip(rows_begin, rows_end, strict=True)):
        while path and rows_end[path[-1]] <= row:
            path.pop()
        if path:
            families.setdefault(path[-1], []).append(run)
        if end > row + 1:
            path.append(run)
    return families


def _left(run: Run, children: list[Run], joins: list[bool]) -> Iterator[int]:
    """Rows of each range that is left of a run when children have joined."""
    at = run[0]
    for (row, end, _), joined in zip(children, joins, strict=True):
        if joined:
            if at < row:
                yield row - at
            at = end
    if at < run[1]:
        yield run[1] - at
