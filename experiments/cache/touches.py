"""A workload in whole chunks: which request touches which chunks, and when they are touched next.

A chunk belongs to the segment that holds its last token. Then all chunks of a segment are touched
by exactly the same requests, whatever the chunk size; what is behind a prompt's last whole chunk is
its tail, which no other request can share.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.cache.workload import Workload


@dataclass(frozen=True)
class Replay:
    """What one replay found.

    Attributes:
      pool_chunks: chunks of the pool; None when it has no bound.
      hit_chunks: chunks of all prompts that were in the pool when their request came.
      requests_hit: requests that found at least one chunk.
      refused: requests that need more chunks than the pool has. They find and touch nothing.
      evicted_chunks: chunks that had to make room.
    """

    pool_chunks: int | None
    hit_chunks: int
    requests_hit: int
    refused: int
    evicted_chunks: int


@dataclass(frozen=True)
class Touches:
    """One entry for each segment that a request touches, in the order of requests, root first.

    Requests are those that fit in the pool, numbered from 0 without the refused. Segments without
    a whole chunk are left out.

    Attributes:
      tails: 1 for each request whose prompt does not end with a chunk: it needs one chunk more,
        for itself, while it is served.
      previous: the request before that touched the segment; -1 if there is none.
      following: the next request that touches it; the number of requests if there is none.
    """

    chunk_size: int
    refused: int
    tails: np.ndarray  # [requests]
    request: np.ndarray  # [touches]
    segment: np.ndarray  # [touches]
    begin_chunk: np.ndarray  # [touches]: chunks of the prompt before the segment's first
    chunks: np.ndarray  # [touches]
    previous: np.ndarray  # [touches]
    following: np.ndarray  # [touches]

    @property
    def num_requests(self) -> int:
        return len(self.tails)

    def replayed(self, pool_chunks: int | None, hits: np.ndarray, evicted_chunks: int) -> Replay:
        """The replay that hit this many chunks of each touch."""
        by_request = np.bincount(self.request, hits, self.num_requests)
        return Replay(
            pool_chunks,
            int(hits.sum()),
            int(np.count_nonzero(by_request)),
            self.refused,
            evicted_chunks,
        )


def count_refused(workload: Workload, chunk_size: int, pool_chunks: int) -> int:
    """Requests that a pool of this size can never hold."""
    return int(np.count_nonzero(_chunks_needed(workload, chunk_size) > pool_chunks))


def find_touches(workload: Workload, chunk_size: int, pool_chunks: int | None = None) -> Touches:
    """What the requests touch that fit in a pool of `pool_chunks` (None: no bound)."""
    needed = _chunks_needed(workload, chunk_size)
    fits = needed <= (needed.max() if pool_chunks is None else pool_chunks)
    paths = [path for path, fit in zip(workload.paths, fits, strict=True) if fit]
    begin_chunks = workload.begins // chunk_size
    chunks = workload.ends // chunk_size - begin_chunks

    segment = np.fromiter((segment for path in paths for segment in path), np.int64)
    request = np.repeat(np.arange(len(paths)), [len(path) for path in paths])
    request, segment = request[chunks[segment] > 0], segment[chunks[segment] > 0]

    by_segment = np.argsort(segment, kind="stable")  # and within one in the order of requests
    again = segment[by_segment][1:] == segment[by_segment][:-1]
    previous = np.full(len(segment), -1)
    following = np.full(len(segment), len(paths))
    previous[by_segment[1:][again]] = request[by_segment[:-1][again]]
    following[by_segment[:-1][again]] = request[by_segment[1:][again]]
    return Touches(
        chunk_size,
        int(np.count_nonzero(~fits)),
        (workload.prompt_tokens[fits] % chunk_size > 0).astype(np.int64),
        request,
        segment,
        begin_chunks[segment],
        chunks[segment],
        previous,
        following,
    )


def _chunks_needed(workload: Workload, chunk_size: int) -> np.ndarray:
    return -(-workload.prompt_tokens // chunk_size)
