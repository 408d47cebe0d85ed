"""How much room heads with windows have, where what their windows have left is given up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@runtime_checkable
class Window(Protocol):
    """A `pallas_kernels.windows.Window`, of which a tree, which needs no JAX, knows no more."""

    @property
    def size(self) -> int: ...

    @property
    def sinks(self) -> int: ...


@dataclass(frozen=True)
class WindowRoom:
    """Chunks that heads with windows have in a pool, fewer than the others, and who may have them.

    A sequence needs those that its window reaches and those of the first tokens that it always
    sees; the rest are given up, the cached ones last. All heads with windows are given up together,
    by the largest of their windows.

    Attributes:
      chunks: of those heads, M.
      window: the largest, in size and in sinks.
      ahead: most tokens, behind those computed, that a sequence has room for.
      call: most tokens of all sequences together that one call computes beyond that.

    Raises:
      ValueError: for less than one chunk or token.
    """

    chunks: int
    window: Window
    ahead: int
    call: int

    def __post_init__(self):
        for name in ("chunks", "ahead", "call"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def most_columns(self, chunk_size: int) -> int:
        """Most chunks of one sequence that are needed from call to call."""
        seen = self.window.size + self.ahead
        return self.sink_columns(chunk_size) + 1 + -(-(seen - 1) // chunk_size)

    def needed(self, sequences: int, chunk_size: int) -> int:
        """Chunks that so many sequences may come to need at once."""
        return sequences * self.most_columns(chunk_size) + self.call_columns(chunk_size)

    def call_columns(self, chunk_size: int) -> int:
        """Chunks of a call's tokens: what its parts begin or end in is among the sequences'."""
        return -(-self.call // chunk_size)

    def sink_columns(self, chunk_size: int) -> int:
        """Chunks of the first tokens, which are always seen."""
        return -(-self.window.sinks // chunk_size)

    def first_column(self, position: int, chunk_size: int) -> int:
        """The first chunk that the window of the token before a position has a part of: who goes on
        from there may have to compute that token again."""
        return max(0, position - self.window.size) // chunk_size
