"""Replaying a workload into a pool, one request after another, with any eviction policy.

The rules are the prefix tree's: a request's chunks that are there are found up to the first that is
not; the rest are brought in, and while the request is served its whole prompt is in the pool, a
tail included; only chunks with nothing cached below them are evicted, when there is no free one,
and never those of the request itself; a prompt that the pool could never hold is refused.

Under these rules `optimal` is optimal: no policy finds more tokens, even one that could evict what
is not a leaf. A node is used whenever one below it is, so what is used again last is a leaf, and
putting off each next use as long as possible is best for pages of equal size (Belady, IBM Systems
Journal 5 (2), 1966), also when several are asked for at once.
"""

from __future__ import annotations

import heapq

import numpy as np

from experiments.cache.policies import CachedSegment, Piece, Policy
from experiments.cache.touches import Replay, Touches
from experiments.trace import BLOCK_TOKENS


def simulate(touches: Touches, pool_chunks: int, policy: Policy) -> Replay:
    """What a pool finds under a policy; `touches` must be of requests that fit in it.

    Costs O(log segments) for each touch and each piece evicted, whatever the number of chunks.
    """
    pool = _Pool(touches, pool_chunks, policy)
    chunks, following = touches.chunks.tolist(), touches.following.tolist()
    segments = touches.segment.tolist()
    bounds = np.searchsorted(touches.request, np.arange(touches.num_requests + 1)).tolist()
    hits: list[int] = []
    for request, tail in enumerate(touches.tails.tolist()):
        touched = slice(bounds[request], bounds[request + 1])
        path = [pool.segments[number] for number in segments[touched]]
        kept = [segment.kept for segment in path]
        hits += kept
        pool.make_room(path, sum(chunks[touched]) - sum(kept), tail)
        for segment, whole, use in zip(path, chunks[touched], following[touched], strict=True):
            pool.use(segment, whole, request, use)
        if path:
            pool.push(path[-1])
    return touches.replayed(pool_chunks, np.array(hits, np.int64), pool.evicted)


class _Pool:
    """Attributes:
    segments: by number; nothing of them is in the pool at first.
    evicted: chunks so far.
    """

    def __init__(self, touches: Touches, pool_chunks: int, policy: Policy) -> None:
        self.segments = _make_segments(touches)
        self.evicted = 0
        self._chunk_size = touches.chunk_size
        self._key, self._per_block = policy.key, policy.per_block
        self._free = pool_chunks
        self._age = 0
        self._leaves: list[tuple[int, int, int]] = []  # key, version, segment; some are stale

    def make_room(self, path: list[CachedSegment], missing: int, tail: int) -> None:
        """Take `missing` chunks for a request with this path, and have `tail` more free."""
        for segment in path:
            segment.version += 1  # so that it is not evicted: its entry is stale
        while (short := missing + tail - self._free) > 0:
            self._evict_first(short, path)
        self._free -= missing

    def use(self, segment: CachedSegment, whole: int, request: int, following: int) -> None:
        """A request uses all of a segment's chunks, `whole` of them; adds those not there."""
        for piece in segment.pieces:
            piece.uses += 1
            piece.aged_uses = self._age + piece.uses
        if segment.kept < whole:
            if segment.kept == 0 and segment.parent is not None:
                segment.parent.children += 1
            segment.pieces.append(Piece(whole - segment.kept, request, 1, self._age + 1))
            segment.kept = whole
        segment.last, segment.following = request, following

    def push(self, segment: CachedSegment) -> None:
        """Make a segment's last piece one that can be evicted, unless there are others below."""
        if segment.children == 0:
            heapq.heappush(self._leaves, self._entry(segment))

    def _entry(self, segment: CachedSegment) -> tuple[int, int, int]:
        end = (segment.begin_chunk + segment.kept) * self._chunk_size
        return self._key(segment, segment.pieces[-1], end), segment.version, segment.number

    def _evict_first(self, most: int, path: list[CachedSegment]) -> None:
        """Evict up to `most` chunks of the piece that is first in order; or drop a stale entry."""
        key, version, number = self._leaves[0]
        segment = self.segments[number]
        if version != segment.version:
            heapq.heappop(self._leaves)
            return
        piece = segment.pieces[-1]
        chunks = piece.chunks if piece.chunks < most else most
        later = key  # of what is left of the piece
        if self._per_block:
            end = segment.begin_chunk + segment.kept
            block = (end * self._chunk_size - 1) // BLOCK_TOKENS
            in_block = end - block * BLOCK_TOKENS // self._chunk_size
            if chunks >= in_block:
                chunks = in_block
                next_block = ((end - chunks) * self._chunk_size - 1) // BLOCK_TOKENS
                later += (block - next_block) * self._per_block
        self._age = piece.aged_uses  # never less than before: what goes later was used more
        piece.chunks -= chunks
        segment.kept -= chunks
        self._free += chunks
        self.evicted += chunks
        if piece.chunks:
            if later != key:
                heapq.heapreplace(self._leaves, (later, version, number))
            return
        segment.pieces.pop()
        heapq.heappop(self._leaves)
        if segment.kept:
            self.push(segment)
        elif segment.parent is not None:
            segment.parent.children -= 1
            if segment.parent not in path:
                self.push(segment.parent)


def _make_segments(touches: Touches) -> dict[int, CachedSegment]:
    """All that are touched; a parent's first touch comes before its children's."""
    segments: dict[int, CachedSegment] = {}
    parent, before = None, -1
    begins = touches.begin_chunk.tolist()
    touched = zip(touches.request.tolist(), touches.segment.tolist(), begins, strict=True)
    for request, number, begin_chunk in touched:
        above = parent if request == before else None
        if number not in segments:
            segments[number] = CachedSegment(number, above, begin_chunk)
        parent, before = segments[number], request
    return segments
