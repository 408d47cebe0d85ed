"""What windows reach of a batch's chunks: which are read, which as a whole, and what is hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np

from jax_chunkattn.planning.block_table import Blocks
from jax_chunkattn.planning.work_items import pad
from pallas_kernels.plans import HiddenTokens
from pallas_kernels.windows import EVERYTHING, FAR, Window

Plan = TypeVar("Plan")


@runtime_checkable
class WithChunks(Protocol):
    """What names chunks, and can be had with other names."""

    def with_chunks(self, name: Callable[[Any], Any], /) -> Any: ...


Named = TypeVar("Named", bound=WithChunks)


@dataclass(frozen=True)
class Reach:
    """The columns of a block table that each row's queries see, while a plan is good.

    A row's window moves on by a token with each of its queries, from the `first` position to the
    `last`: what only some of them see is read, and masked. Letters: B rows, P columns.

    Attributes:
      begins, opens: int [B]: the first column of which the window has a token for some query, and
        from which on it has all for every query.
      columns: P.
      sink_columns: that sinks fill.
      is_all: every row sees all of its tokens. Then nothing here looks at single columns: planning
        without windows costs no more than if there were none.
    """

    window: Window
    begins: np.ndarray
    opens: np.ndarray
    columns: int
    chunk_size: int
    is_all: bool

    @classmethod
    def of(
        cls,
        window: Window | None,
        first: np.ndarray,
        last: np.ndarray,
        columns: int,
        chunk_size: int,
    ) -> Reach:
        """Of rows whose queries are at positions from `first` to `last`, both int [B]."""
        window = window or EVERYTHING
        begins = np.maximum(first + 1 - window.size, 0) // chunk_size
        opens = -(-np.maximum(last + 1 - window.size, 0) // chunk_size)
        return cls(window, begins, opens, columns, chunk_size, is_all=not opens.any())

    @property
    def sink_columns(self) -> int:
        return self.window.sinks // self.chunk_size

    def read(self, ends: np.ndarray) -> np.ndarray:
        """The columns before `ends` [B] of which some query sees a token: bool [B, P]."""
        column = np.arange(self.columns)
        read = column < ends[:, None]
        if not self.is_all:
            sinks = -(-self.window.sinks // self.chunk_size)
            read &= (column < sinks) | (column >= self.begins[:, None])
        return read

    def whole(self, ends: np.ndarray) -> np.ndarray:
        """The columns before `ends` [B] of which every query sees all: bool [B, P]."""
        column = np.arange(self.columns)
        whole = column < ends[:, None]
        if not self.is_all:
            whole &= (column < self.sink_columns) | (column >= self.opens[:, None])
        return whole

    def count_read(self, ends: np.ndarray) -> np.ndarray:
        """How many columns `read` has of each row: int32 [B]."""
        return ends if self.is_all else self.read(ends).sum(axis=1, dtype=np.int32)

    def count_whole(self, ends: np.ndarray) -> np.ndarray:
        """How many columns `whole` has of each row: int32 [B]."""
        return ends if self.is_all else self.whole(ends).sum(axis=1, dtype=np.int32)

    def clip(self, runs: Blocks) -> Blocks:
        """What all rows of a run see of it as a whole; rows that see nothing of one divide it.

        They come in the order of the runs. Of rows whose windows begin in different chunks, those
        that see more read the difference by themselves.
        """
        if self.is_all:
            return runs
        blocks = []
        fields = (field.tolist() for field in vars(runs).values())
        for row, begin, row_end, end in zip(*fields, strict=True):
            opens = np.maximum(self.opens[row:row_end], min(max(begin, self.sink_columns), end))
            if opens.max() <= max(begin, self.sink_columns):
                blocks.append((row, begin, row_end, end))  # sinks and window meet
                continue
            if begin < self.sink_columns:
                blocks.append((row, begin, row_end, min(end, self.sink_columns)))
            seen = np.append(np.append(False, opens < end), False)
            edges = np.nonzero(seen[1:] != seen[:-1])[0].tolist()
            for first, behind in zip(edges[::2], edges[1::2], strict=True):
                blocks.append((row + first, int(opens[first:behind].max()), row + behind, end))
        return Blocks.of(blocks)

    def hidden(self, listed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`begin` and `offset` of `HiddenTokens`, for rows that read the columns `listed` [B, P] by
        themselves, one after another. What is live and not listed is seen as a whole."""
        size, sinks = self.chunk_size, self.window.sinks
        before = np.zeros((len(listed), listed.shape[1] + 1), np.int64)
        before[:, 1:] = listed.cumsum(axis=1)
        last = listed.shape[1]
        rows, part = np.arange(len(listed)), min(self.sink_columns, last)
        begin = before[:, part] * size
        if part < last:
            begin += np.where(listed[:, part], sinks % size, 0)
        at = np.maximum(self.begins, self.sink_columns)
        inside, at = at < last, np.minimum(at, last)
        offset = np.where(inside, at * size - before[rows, at] * size, FAR)
        return begin, offset


def hidden_tokens(
    windows: Sequence[Window | None], places: Sequence[tuple[np.ndarray, np.ndarray]], rows: int
) -> HiddenTokens:
    """What each window hides, from the `Reach.hidden` of each, padded to so many rows."""
    seen = [window or EVERYTHING for window in windows]
    return HiddenTokens(
        size=np.array([window.size for window in seen], np.int32),
        sinks=np.array([window.sinks for window in seen], np.int32),
        begin=np.stack([pad(begin, rows) for begin, _ in places]),
        offset=np.stack([pad(offset, rows, FAR) for _, offset in places]),
    )


def with_window_ids(
    plans: Sequence[Named], windows: Sequence[Window | None], ids: np.ndarray | None
) -> list[Named]:
    """Plans of all windows, with chunks named as heads have them that go by a window."""
    if ids is None:
        return list(plans)
    return [
        plan if window is None else plan.with_chunks(ids.__getitem__)
        for plan, window in zip(plans, windows, strict=True)
    ]


def stack(plans: Sequence[Plan]) -> Plan:
    """Plans of one shape as one, with a first axis over them."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *plans)
