"""Chunks in memory of the host."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np


class HostTier:
    """Chunks by their names, as many as fit; the least recently used make room. Not thread-safe.

    Attributes:
      most: chunks that there is room for.
    """

    def __init__(self, most: int):
        self.most = most
        self._chunks: OrderedDict[bytes, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._chunks

    def use(self, name: bytes) -> np.ndarray | None:
        """A chunk, which is the most recently used then; None where it is not there."""
        chunk = self._chunks.get(name)
        if chunk is not None:
            self._chunks.move_to_end(name)
        return chunk

    def put(self, name: bytes, chunk: np.ndarray) -> list[tuple[bytes, np.ndarray]]:
        """Keeps a chunk as the most recently used; returns those that had to go, with it itself
        when there is no room for any."""
        self._chunks[name] = chunk
        self._chunks.move_to_end(name)
        gone = []
        while len(self._chunks) > self.most:
            gone.append(self._chunks.popitem(last=False))
        return gone

    def clear(self) -> None:
        """Forgets all of them."""
        self._chunks.clear()
