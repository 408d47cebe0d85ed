"""How long a plan takes on a GPU, as far as the planner can tell, and how to cut it for that.

Times are in reads of one chunk by one program. Programs, of the chunk-first phase (a tile of an
item's rows, KV head) and then of the sequence-first phase (row, KV head), are taken by as many
workers as run at once, longest first. Reads of a chunk by several tiles all count, although the
second and later may find it in the cache.
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from jax_chunkattn.planning.block_table import Blocks, covered_columns
from jax_chunkattn.planning.options import GpuWork

_SHARES = (4.0, 2.0, 1.4, 1.0, 0.7, 0.5, 0.25)
"""Lengths of pieces to try, as parts of what every worker would get of an even division; and one
chunk more than that, for runs that are a little longer than a multiple."""


def choose_pieces(rows: np.ndarray, chunks: np.ndarray, gpu: GpuWork) -> np.ndarray:
    """How many pieces of nearly equal length to cut the run of each item into, int [I].

    Only idle workers are a reason to cut: a piece costs a program and a partial for each row. Of
    several lengths that follow from the even share, the fastest is taken. PAT has its own rule.

    Args:
      rows, chunks: of each item, [I].
    """
    if not len(rows):
        return np.zeros(0, np.int64)
    if gpu.packing == "pat":
        return _pat_pieces(rows, chunks, gpu)
    share = int((_tiles(rows, gpu) * chunks).sum()) * gpu.num_kv_heads / gpu.workers
    most_pieces = np.maximum(1, chunks // gpu.min_piece)
    longest = int(chunks.max())
    tried = [math.ceil(share) + 1, *(math.ceil(share * part) for part in _SHARES)]
    lengths = {max(gpu.min_piece, length) for length in tried}
    best = np.ones_like(chunks)
    best_time = _cut_time(rows, chunks, best, gpu)
    for length in sorted((length for length in lengths if length < longest), reverse=True):
        pieces = np.minimum(-(-chunks // length), most_pieces)
        time = _cut_time(rows, chunks, pieces, gpu)
        if time < best_time:
            best, best_time = pieces, time
    return best


def most_items_alone(tiles: int, runs: int, columns: int, gpu: GpuWork) -> tuple[int, int]:
    """Most items that `choose_pieces` and query tiles make of `runs` runs of `columns` chunks that
    have `tiles` tiles together, and most slots for their partials.

    Of a run there are at most `columns / min_piece` pieces. And no piece is shorter than the
    smallest of `_SHARES` of the even share, but the last of its run: that many pieces fill all
    workers, and one more for each tile. PAT cuts runs to five times their mean before that.
    """
    filling = math.ceil(gpu.workers / (gpu.num_kv_heads * min(_SHARES)))
    by_length = 2 * tiles * max(1, columns // gpu.min_piece)
    items = min(by_length, filling + tiles + runs // 4)
    flattened = -(-gpu.tile_rows * gpu.group // gpu.align) * gpu.align
    return items, items * -(-flattened // gpu.group)


def plan_time(
    blocks: Blocks, pieces: np.ndarray, full: np.ndarray, covered: np.ndarray, gpu: GpuWork
) -> float:
    """Of both phases, in chunks.

    Row b reads by itself what is left of its `full[b]` chunks behind `covered[b]`, and its tail.
    """
    partials = covered_columns(
        len(full), Blocks(blocks.row_begin, np.zeros_like(pieces), blocks.row_end, pieces)
    )
    rows = gpu.program_cost + full - covered + 1 + gpu.partial_read_cost * partials
    last = _makespan(rows, np.full(len(full), gpu.num_kv_heads), gpu.workers)
    return last + _chunk_first_time(blocks.rows, blocks.columns, pieces, gpu)


def _cut_time(rows: np.ndarray, chunks: np.ndarray, pieces: np.ndarray, gpu: GpuWork) -> float:
    """What depends on the cuts: the chunk-first phase, and all partials read, evenly divided."""
    partials = int((rows * pieces).sum()) * gpu.num_kv_heads
    merging = partials * gpu.partial_read_cost / gpu.workers
    return merging + _chunk_first_time(rows, chunks, pieces, gpu)


def _chunk_first_time(
    rows: np.ndarray, chunks: np.ndarray, pieces: np.ndarray, gpu: GpuWork
) -> float:
    tile = np.minimum(rows, gpu.tile_rows)
    program = gpu.program_cost - (-chunks // pieces) + gpu.partial_write_cost * tile
    return _makespan(program, _tiles(rows, gpu) * pieces * gpu.num_kv_heads, gpu.workers)


def _makespan(times: np.ndarray, copies: np.ndarray, workers: int) -> float:
    """Until the last of `copies[i]` programs of `times[i]` each ends, taken longest first.

    As if all workers waited for one another after every program, so that a last wave of a few
    programs counts in full. That is at most what the longest takes more than the shortest above
    the total divided evenly, when the last wave is full.
    """
    order = np.argsort(-times)
    taken = np.cumsum(copies[order])
    if not len(taken):
        return 0.0
    waves = np.searchsorted(taken, np.arange(0, taken[-1], workers), side="right")
    return float(times[order[waves]].sum())


def _pat_pieces(rows: np.ndarray, chunks: np.ndarray, gpu: GpuWork) -> np.ndarray:
    """PAT's rule: items of more than five times the mean are cut; then, while there is work for
    idle workers, the longest pieces are halved: all of their run, which stay equal."""
    pieces = -(-chunks // math.ceil(5 * chunks.mean()))
    pieces = np.minimum(pieces, np.maximum(1, chunks // gpu.min_piece))
    copies = _tiles(rows, gpu) * gpu.num_kv_heads
    idle = gpu.workers - int((pieces * copies).sum())
    if idle <= 0:
        return pieces
    longest = [(-length, item) for item, length in enumerate((chunks / pieces).tolist())]
    heapq.heapify(longest)
    while longest:
        length, item = heapq.heappop(longest)
        more = int(pieces[item] * copies[item])
        if -length / 2 >= gpu.min_piece and more <= idle:
            pieces[item] *= 2
            idle -= more
            heapq.heappush(longest, (length / 2, item))
    return pieces


def _tiles(rows: np.ndarray, gpu: GpuWork) -> np.ndarray:
    return -(-rows // gpu.tile_rows)
