"""Chunks of heads with windows: which of a tree's chunks have one, who needs it, which go first.

The rest of the tree knows chunks by one id, that of the heads that see all. Heads with windows have
fewer chunks, with ids of their own, and only chunks that some window reaches, or that were not
needed for something else since, have one. So a path may be cached for the first heads and not for
the others: then it is found as far as both have what a query behind it reads (vLLM's hybrid KV
cache manager has that rule), and what the others lack is computed again.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jax_chunkattn.tree.allocator import ChunkAllocator
from jax_chunkattn.tree.nodes import Node, SequenceHandle
from jax_chunkattn.tree.window_room import WindowRoom


class EveryChunk:
    """Heads with windows, if there are any, have every chunk that the others have: what
    `WindowedChunks` is where nothing is given up."""

    room: WindowRoom | None = None
    ids: np.ndarray | None = None
    in_use_count: int = 0

    def has_room(self) -> bool:
        return True

    def has(self, chunk_id: int) -> bool:
        return True

    def usable(self, nodes: Sequence[Node]) -> int:
        return len(nodes)

    def begin_of(self, sequence: SequenceHandle, computed: int) -> int:
        return computed

    def count(self, sequence: SequenceHandle) -> int:
        return 0

    def enter(self, sequence: SequenceHandle, position: int) -> None: ...

    def leave(self, sequence: SequenceHandle) -> None: ...

    def go_on_from(self, sequence: SequenceHandle, position: int) -> None: ...

    def restart_from(self, sequence: SequenceHandle, position: int) -> None: ...

    def fill(self, sequence: SequenceHandle, begin: int, end: int) -> list[int]:
        return []

    def reserve(self, sequence: SequenceHandle, computed: int, end: int) -> bool:
        return False

    def places(self, chunk_ids: Sequence[int]) -> list[int]:
        return list(chunk_ids)

    def copy(
        self, sequence: SequenceHandle, begin: int, end: int, copies: list[tuple[int, int]]
    ) -> None: ...

    def exchange(self, sequence: SequenceHandle, column: int, chunk_id: int) -> None: ...

    def forget(self, chunk_id: int) -> None: ...

    def check(self, sequences: Iterable[SequenceHandle]) -> None: ...


class WindowedChunks(EveryChunk):
    """The chunks of heads with windows, by the id that a chunk has for all others.

    Every sequence holds those that its next queries read. What nobody holds stays until the room is
    needed: first what was computed and passed by, then what somebody has begun or ended at, the
    least recently used first.

    A sequence is promised all it may come to need when it comes, so room is never short after that.

    Attributes:
      ids: int32 [N + 1], of each of a tree's N chunks its chunk here; N where it has none.
    """

    def __init__(self, num_chunks: int, chunk_size: int, room: WindowRoom):
        """Raises ValueError when there is not even room for one sequence."""
        self.room = self._room = room
        if room.needed(1, chunk_size) > room.chunks:
            raise ValueError(
                f"a sequence may need {room.needed(1, chunk_size)} chunks of {chunk_size} tokens "
                f"for its window of {room.window.size} and a call, there are {room.chunks}"
            )
        self._ids = array("i", [num_chunks]) * (num_chunks + 1)  # faster, one by one, than NumPy's
        self.ids = np.frombuffer(self._ids, np.int32)
        self._size = chunk_size
        self._nowhere = num_chunks
        self._allocator = ChunkAllocator(room.chunks)
        self._holders: Counter[int] = Counter()
        self._passed: dict[int, None] = {}
        self._begun_at: dict[int, None] = {}
        self._sequences = 0

    # Sizes.

    @property
    def in_use_count(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Chunks that some sequence holds."""
        cached = len(self._passed) + len(self._begun_at)
        return self._room.chunks - self._allocator.free_count - cached

    def has_room(self) -> bool:
        """Whether one more sequence can be promised what it needs."""
        return self._room.needed(self._sequences + 1, self._size) <= self._room.chunks

    # Where a sequence may begin.

    def has(self, chunk_id: int) -> bool:
        """Whether a chunk is here too."""
        return self._ids[chunk_id] != self._nowhere

    def usable(self, nodes: Sequence[Node]) -> int:
        """How many of a path's chunks a sequence behind them may build on; those that others are to
        compute count."""

        def there(column: int) -> bool:
            return self.has(nodes[column].chunk_id) or not nodes[column].computed

        return self._begin(there, len(nodes) * self._size) // self._size

    def begin_of(self, sequence: SequenceHandle, computed: int) -> int:
        """Where a sequence can go on, of which so many tokens are computed for the other heads."""
        return self._begin(lambda column: self.has(sequence.chunk_ids[column]), computed)

    def _begin(self, there: Callable[[int], bool], position: int) -> int:
        """The last position, up to this one, of which all columns that are read are there; the
        beginning of a chunk, if it is not this one."""
        sinks = self._room.sink_columns(self._size)
        for column in range(min(sinks, -(-position // self._size))):
            if not there(column):
                position = column * self._size
                break
        column = -(-position // self._size) - 1
        while column >= max(sinks, self._room.first_column(position, self._size)):
            if not there(column):
                position = column * self._size
            column -= 1
        return position

    def count(self, sequence: SequenceHandle) -> int:
        """Chunks that a sequence holds."""
        return len(self._held_columns(sequence.windowed))

    # Sequences.

    def enter(self, sequence: SequenceHandle, position: int) -> None:
        """Promises a sequence what it may need, and keeps for it what is read from a position."""
        self._sequences += 1
        self.go_on_from(sequence, position)

    def leave(self, sequence: SequenceHandle) -> None:
        """The end of a sequence; what it was the last to hold of sealed chunks stays cached."""
        self._sequences -= 1
        self._hold(sequence, range(0), ended=True)

    def go_on_from(self, sequence: SequenceHandle, position: int) -> None:
        """A sequence needs what queries from a position on read, and what it asked for behind that;
        nothing happens when it is further on."""
        held = sequence.windowed
        begin = max(self._room.first_column(position, self._size), held.start)
        end = max(-(-position // self._size), held.stop)
        self._hold(sequence, range(min(begin, end), end))

    def restart_from(self, sequence: SequenceHandle, position: int) -> None:
        """The same for a sequence that begins there, whatever it has asked for before."""
        begin, end = self._room.first_column(position, self._size), -(-position // self._size)
        self._hold(sequence, range(min(begin, end), end))

    def fill(self, sequence: SequenceHandle, begin: int, end: int) -> list[int]:
        """Room for a sequence's tokens at positions from `begin` to `end`: the columns that had
        none, each of which is then to be computed as a whole, or copied.

        Raises ValueError when there are more tokens than may have room at once.
        """
        most = max(self._room.ahead, self._room.call)
        if end - begin > most:
            raise ValueError(f"room for {end - begin} tokens at once, at most {most} can have it")
        self.go_on_from(sequence, begin)
        columns = range(begin // self._size, -(-end // self._size))
        held = sequence.windowed
        self._hold(sequence, range(held.start, max(held.stop, columns.stop)))
        fresh = [column for column in columns if not self.has(sequence.chunk_ids[column])]
        self._make_room(len(fresh))
        chunks = self._allocator.allocate(len(fresh))
        for column, chunk in zip(fresh, chunks, strict=True):
            self._ids[sequence.chunk_ids[column]] = chunk
        return fresh

    def reserve(self, sequence: SequenceHandle, computed: int, end: int) -> bool:
        """Room for the tokens behind a sequence, up to a position; whether there was none. Before
        it is computed there is `fill` for what is missing."""
        reached = sequence.windowed.stop * self._size >= end
        if reached or self.begin_of(sequence, computed) < sequence.num_tokens:
            return False
        return bool(self.fill(sequence, sequence.num_tokens, end))

    def places(self, chunk_ids: Sequence[int]) -> list[int]:
        """Where chunks are here, by this pool's ids: to be asked before anything is evicted of
        which a copy is to be made."""
        return [self._ids[chunk_id] for chunk_id in chunk_ids]

    def copy(
        self, sequence: SequenceHandle, begin: int, end: int, copies: list[tuple[int, int]]
    ) -> None:
        """Room for a sequence's tokens that are copied, and what is to be copied here.

        Each copy is given as the source's place (`places`) and the chunk that is its destination.
        """
        self.fill(sequence, begin, end)
        sequence.window_copies = [
            (place, self._ids[to]) for place, to in copies if place != self._nowhere
        ]

    def exchange(self, sequence: SequenceHandle, column: int, chunk_id: int) -> None:
        """Another chunk, with the same tokens, takes a column's place; the old one is given up."""
        old = sequence.chunk_ids[column]
        held = column in self._held_columns(sequence.windowed)
        if held:
            self._release(old)
        if self.has(old) and not self.has(chunk_id):
            self._ids[chunk_id], self._ids[old] = self._ids[old], self._nowhere
            self._uncache(old)
            if not self._holders[chunk_id]:
                self._passed[chunk_id] = None
        self.forget(old)
        if held:
            self._take(chunk_id)

    # Single chunks.

    def forget(self, chunk_id: int) -> None:
        """A chunk that nobody holds is free in the tree, or is to hold something else."""
        if self.has(chunk_id):
            self._allocator.free((self._ids[chunk_id],))
            self._ids[chunk_id] = self._nowhere
            self._uncache(chunk_id)

    def _uncache(self, chunk_id: int) -> None:
        """Takes a chunk out of the orders of eviction, if it is in one."""
        self._passed.pop(chunk_id, None)
        self._begun_at.pop(chunk_id, None)

    def _held_columns(self, columns: range) -> list[int]:
        """What a sequence holds that holds these: the first ones too."""
        sinks = min(self._room.sink_columns(self._size), columns.stop)
        return [*range(min(sinks, columns.start)), *columns]

    def _hold(self, sequence: SequenceHandle, columns: range, *, ended: bool = False) -> None:
        """Has a sequence hold these columns, and those of sinks, instead of what it held."""
        if columns == sequence.windowed:
            return
        before = set(self._held_columns(sequence.windowed))
        after = set(self._held_columns(columns))
        for column in after - before:
            self._take(sequence.chunk_ids[column])
        begun_at = sequence.num_cached_tokens // self._size
        for column in sorted(before - after, reverse=True):  # the deepest goes first
            chunk_id = sequence.chunk_ids[column]
            self._release(chunk_id)
            if self._holders[chunk_id] or not self.has(chunk_id):
                continue
            if column >= len(sequence.nodes):
                self.forget(chunk_id)
            elif ended or column < begun_at:
                self._begun_at[chunk_id] = None
            else:
                self._passed[chunk_id] = None
        sequence.windowed = columns

    def _take(self, chunk_id: int) -> None:
        self._holders[chunk_id] += 1
        self._uncache(chunk_id)

    def _release(self, chunk_id: int) -> None:
        self._holders[chunk_id] -= 1
        if not self._holders[chunk_id]:
            del self._holders[chunk_id]

    def _make_room(self, count: int) -> None:
        """Frees what nobody holds until so many are free."""
        for order in (self._passed, self._begun_at):
            while order and self._allocator.free_count < count:
                self.forget(next(iter(order)))

    def check(self, sequences: Iterable[SequenceHandle]) -> None:
        """Raises AssertionError naming the first invariant that does not hold."""
        self._allocator.check()
        held: Counter[int] = Counter()
        number = 0
        most = self._room.most_columns(self._size) + self._room.call_columns(self._size)
        for sequence in sequences:
            number += 1
            columns = self._held_columns(sequence.windowed)
            _require(len(columns) <= most, "a sequence holds more than was promised")
            held.update(sequence.chunk_ids[column] for column in columns)
        _require(held == self._holders, "the holders are counted wrongly")
        _require(self._sequences == number, "the sequences are counted wrongly")
        there = [one for one in range(len(self._ids) - 1) if self.has(one)]
        chunks = [self._ids[chunk_id] for chunk_id in there]
        _require(len(set(chunks)) == len(chunks), "two chunks are in one place")
        free = self._room.chunks - self._allocator.free_count
        _require(len(chunks) == free, "a chunk is neither used nor free")
        cached = {*self._passed, *self._begun_at}
        _require(not self._passed.keys() & self._begun_at.keys(), "a chunk is cached twice")
        _require(
            cached == {chunk_id for chunk_id in there if not held[chunk_id]},
            "not what nobody holds is cached",
        )


def _require(condition: bool, broken: str) -> None:
    if not condition:
        raise AssertionError(f"windowed chunks: {broken}")
