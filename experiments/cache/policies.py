"""Eviction policies that the engine does not have, to compare its own with.

A policy orders the leaves of the tree of cached chunks: that with the least key goes first. All of
a segment's chunks that came together have been used alike, so a key is that of a piece, such a run
of chunks, and the chunk at its end goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.trace import BLOCK_TOKENS

_MANY = 2**32  # more than requests or blocks of a prompt: keys of several numbers are one integer


@dataclass(slots=True)
class Piece:
    """Chunks of one segment that came into the pool together and are still there.

    Attributes:
      inserted: the request they came with.
      uses: requests that have used them since then, that one included.
      aged_uses: `uses` at the last use, plus the pool's age then.
    """

    chunks: int
    inserted: int
    uses: int
    aged_uses: int


@dataclass(slots=True, eq=False)
class CachedSegment:
    """Attributes:
    number: its own.
    begin_chunk: chunks of a prompt before its first.
    kept: its chunks that are in the pool, always the first ones: those of `pieces`.
    last, following: the request that used it last, and the one that will use it next.
    children: segments below it with chunks in the pool.
    version: changes when it is used; an entry in the order of eviction with another is stale.
    """

    number: int
    parent: CachedSegment | None
    begin_chunk: int
    pieces: list[Piece] = field(default_factory=list)
    kept: int = 0
    last: int = -1
    following: int = -1
    children: int = 0
    version: int = 0


def _first_come(segment: CachedSegment, piece: Piece, end: int) -> int:
    return piece.inserted * _MANY + segment.last


def _least_used(segment: CachedSegment, piece: Piece, end: int) -> int:
    return piece.uses * _MANY + segment.last


def _least_used_aged(segment: CachedSegment, piece: Piece, end: int) -> int:
    return piece.aged_uses * _MANY + segment.last


def _least_used_deepest(segment: CachedSegment, piece: Piece, end: int) -> int:
    return (piece.uses * _MANY - (end - 1) // BLOCK_TOKENS) * _MANY + segment.last


def _least_recent(segment: CachedSegment, piece: Piece, end: int) -> int:
    return segment.last


def _furthest_use(segment: CachedSegment, piece: Piece, end: int) -> int:
    return -segment.following


@dataclass(frozen=True)
class Policy:
    """Attributes:
    meaning: what it evicts first, among leaves.
    key: of a segment, its last piece, and where in a prompt that ends, in tokens.
    per_block: what the key of a piece grows by with each block of 512 tokens of the prompt that its
      end has gone back by; 0 if it does not depend on that, so that a piece goes at once.
    """

    meaning: str
    key: Callable[[CachedSegment, Piece, int], int]
    per_block: int = 0


SIMULATED = {
    "fifo": Policy("what came first", _first_come),
    "lfu": Policy("what the fewest requests have used since it came", _least_used),
    "lfu-aged": Policy(
        "as LFU, but uses count from the pool's age on, the count of what went last (LFU with "
        "dynamic aging: Arlitt et al., 2000)",
        _least_used_aged,
    ),
    "length-aware": Policy(
        "as LFU, and of what was used as often, what stands latest in its prompt, by blocks of 512 "
        "tokens (after Mooncake's LengthAwareCache, arXiv 2407.00079, section 4.2)",
        _least_used_deepest,
        per_block=_MANY,
    ),
    "optimal": Policy(
        "what is used again last or never, which only a clairvoyant knows", _furthest_use
    ),
}
"""Policies by name, in the order they are shown; what is left equal goes least recently used."""

LRU = Policy("what was used least recently", _least_recent)
"""The engine's, simulated: `recency.replay_lru` computes the same for all pools at once."""
