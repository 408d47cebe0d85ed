"""Block tables of an `AttentionCase`, straight from the shape of its tree.

A prefix tree over token ids finds the same sharing, one token at a time: too slow for a benchmark
of a thousand rows. A test holds the two to each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pallas_kernels.specs import AttentionCase


@dataclass(frozen=True)
class CaseTables:
    """The chunks of every row.

    Attributes:
      tables: int32 [B, P], the chunks of each row, all rows of one length; ids from 0 on.
      length: tokens of each row.
      num_chunks: chunks that some row has.
      distinct_tokens: tokens in them, each counted once.
    """

    tables: np.ndarray
    length: int
    num_chunks: int
    distinct_tokens: int

    @property
    def rows(self) -> int:
        return len(self.tables)

    @property
    def lengths(self) -> list[int]:
        return [self.length] * self.rows

    def placed(self, num_chunks: int, seed: int) -> np.ndarray:
        """The tables with ids spread at random over a pool of `num_chunks`."""
        place = np.random.default_rng(seed).permutation(num_chunks)[: self.num_chunks]
        return place.astype(np.int32)[self.tables]


def case_tables(case: AttentionCase) -> CaseTables:
    """Tables of a case without ragged ends.

    A full chunk is shared by the rows below the node that its last token belongs to, and the last
    chunk of a row, where it is not full, is the row's own.

    Raises:
      ValueError: for a ragged case.
    """
    if case.ragged:
        raise ValueError(f"{case.name} has ragged rows")
    ends = np.cumsum(case.tokens_per_level)
    length, size = int(ends[-1]), case.chunk_size
    columns = np.arange(-(-length // size))
    last_token = np.minimum((columns + 1) * size, length) - 1
    levels = np.searchsorted(ends, last_token, side="right")
    nodes = np.asarray(case.nodes_per_level)[levels]
    nodes[(columns + 1) * size > length] = case.batch
    owner = np.arange(case.batch)[:, None] * nodes[None] // case.batch  # [B, P]
    begin = np.cumsum(nodes) - nodes
    tokens = np.minimum(size, length - columns * size)
    return CaseTables(
        tables=(begin[None] + owner).astype(np.int32),
        length=length,
        num_chunks=int(nodes.sum()),
        distinct_tokens=int((nodes * tokens).sum()),
    )
