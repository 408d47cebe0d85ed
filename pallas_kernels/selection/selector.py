"""How many chunks a query reads, which it reads always, and by what the others are chosen.

Hierarchically pruned attention (HiP, arXiv 2406.09827, section 3) reads the first tokens, the last
ones, and the k blocks of keys that score best, and chooses anew every few steps. Here a block is a
chunk of the pool, and what a query reads depends on its position and the tokens before it alone:
the queries of `refresh` consecutive positions read what the first of them has chosen, in prefill as
in decoding, so that it makes no difference who computed what when.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

POLICIES = ("scores", "bounds", "hip")
YARDSTICKS = ("oracle", "recent", "random")


@dataclass(frozen=True)
class ChunkSelector:
    """What each query reads of the chunks before its own.

    Attributes:
      keep: the share of the chunks up to its own that a query reads, those that it reads always
        among them; at least one more than those.
      policy: by what they are chosen. "scores": by the best score of any of a chunk's keys, as 4
        bits have them. "bounds": by what the least and the largest number of each channel of its
        keys let a score be at most (Quest, arXiv 2406.10774, section 3.3). "hip": by descent, which
        compares few chunks (HiP, Algorithm 1). The last two miss single keys that matter, such as
        those of text to be copied. To measure these against: "oracle", by the attention that each
        chunk gets with its keys as they are; "recent", the last ones; "random" ones.
      sinks: chunks at the beginning that every query reads.
      recent: chunks before its own that it reads always.
      refresh: positions in a row that read what the first of them has chosen.
      dense_layers: those whose queries read everything.
      whole: queries with at most so many chunks up to their own read all of them. Where there are
        fewer, choosing costs more than it saves, on 2 cores with chunks of 64 tokens.

    Raises:
      ValueError: for a share that is not above 0 and at most 1, an unknown policy, or numbers below
        0 (of `refresh`, 1).
    """

    keep: float
    policy: str = "scores"
    sinks: int = 1
    recent: int = 1
    refresh: int = 4
    dense_layers: tuple[int, ...] = ()
    whole: int = 32

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"the share of chunks to keep is above 0 and at most 1: {self.keep}")
        known = POLICIES + YARDSTICKS
        if self.policy not in known:
            raise ValueError(f"unknown policy {self.policy!r}; known: {', '.join(known)}")
        for name, least in (("sinks", 0), ("recent", 0), ("refresh", 1), ("whole", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if min(self.dense_layers, default=0) < 0:
            raise ValueError(f"dense layers are numbers from 0, got {self.dense_layers}")

    @property
    def name(self) -> str:
        """In results and statistics."""
        return f"{self.policy} {self.keep:g}"

    @property
    def looks_at_all(self) -> bool:
        """Whether it scores all chunks, and not a few of them."""
        return self.policy in ("scores", "bounds")

    def check(self, chunk_size: int, num_layers: int) -> None:
        """Raises ValueError where a choice would be for tokens of two chunks, or for layers that
        there are none of."""
        if chunk_size % self.refresh:
            raise ValueError(
                f"a query chooses for {self.refresh} positions, which do not divide a chunk of "
                f"{chunk_size} tokens"
            )
        if max(self.dense_layers, default=0) >= num_layers:
            raise ValueError(
                f"layer {max(self.dense_layers)} is to read everything, and the model has "
                f"{num_layers} layers"
            )

    def always(self, chunks: np.ndarray) -> np.ndarray:
        """Of so many chunks up to a query's own, how many it reads always."""
        return np.minimum(chunks, self.sinks + self.recent + 1)

    @functools.cache  # noqa: B019 - of a few values for the life of a process
    def counts(self, columns: int) -> np.ndarray:
        """Chunks that a query reads whose own is the c-th of its sequence: int32 [columns]."""
        chunks = np.arange(1, columns + 1)
        share = np.array([math.ceil(round(self.keep * total, 6)) for total in chunks.tolist()])
        share = np.where(chunks <= self.whole, chunks, share)
        return np.clip(share, np.minimum(self.always(chunks) + 1, chunks), chunks).astype(np.int32)

    def most_read(self, columns: int) -> int:
        """Most chunks that any query reads."""
        return int(self.counts(columns).max())

    def most_chosen(self, columns: int) -> int:
        """Most chunks that a query that leaves some out reads of those it does not read always."""
        chunks = np.arange(1, columns + 1)
        counts = self.counts(columns)
        return int(np.where(counts < chunks, counts - self.always(chunks), 0).max())
