"""All tiers behind the pool as one, with threads that move chunks while others work."""

from __future__ import annotations

import enum
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from jax_chunkattn.tiers.disk import DiskTier, Unreadable, words_of
from jax_chunkattn.tiers.host import HostTier

Result = TypeVar("Result")

WAITING_BYTES = 256 << 20
"""Of chunks that wait to be written to the disk; when it cannot keep up, more are not written."""


class Tier(enum.Enum):
    """Where a chunk is, behind the pool."""

    HOST = "host"
    DISK = "disk"


@dataclass
class Moved:
    """What has been moved so far. Written under the store's lock.

    Attributes:
      kept: chunks that have come to each tier.
      dropped: chunks that were not written, since the disk could not keep up.
      failures: chunks that could not be moved, by reason.
    """

    kept: Counter[Tier] = field(default_factory=Counter)
    dropped: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class ChunkStore:
    """Chunks by their names, each so many bytes.

    What `later` is given runs in one thread, in order: what an earlier one has `put`, a later one
    can `get`. Files are written by another.
    """

    def __init__(self, chunk_bytes: int, host: HostTier, disk: DiskTier | None):
        self._host = host
        self._disk = disk
        self._lock = threading.RLock()  # a signal's handler may read what its thread is changing
        self._moved = Moved()
        self._coming: Counter[bytes] = Counter()
        self._evicted: set[bytes] = set()  # of those that are coming
        self._waiting: dict[bytes, np.ndarray] = {}  # to be written
        self._mover = ThreadPoolExecutor(1, "chunks")
        self._writer = ThreadPoolExecutor(1, "chunk-files")
        self._writes: deque[Future] = deque()
        self._used: dict[bytes, None] = {}  # that the disk has not been told of
        self._most_waiting = max(1, WAITING_BYTES // chunk_bytes)
        self._closed = False

    @property
    def has_disk(self) -> bool:
        return self._disk is not None

    @property
    def moved(self) -> Moved:
        """A copy."""
        with self._lock:
            return deepcopy(self._moved)

    @property
    def sizes(self) -> dict[Tier, int]:
        """Chunks in each tier, as far as is known."""
        with self._lock:
            return {Tier.HOST: len(self._host), Tier.DISK: len(self._disk or ())}

    # Finding.

    def find(self, name: bytes) -> Tier | None:
        """Where a chunk will be when all that was put has come there."""
        with self._lock:
            if name in self._host or name in self._coming or name in self._waiting:
                return Tier.HOST
        if self._disk is not None and self._disk.has(name):
            return Tier.DISK
        return None

    def lacks(self, name: bytes, *, evicted: bool) -> bool:
        """Whether a chunk should be put: one that is evicted where it is not in memory, another
        where it is not on the disk. One that is there counts as used, and one that is on its way
        to the disk comes to memory too when it is evicted."""
        to_memory = evicted and self._host.most > 0
        with self._lock:
            if name in self._coming:
                if to_memory:
                    self._evicted.add(name)
                return False
            waiting = self._waiting.get(name)
            if to_memory and self._host.use(name) is not None:
                return False
        if waiting is not None:
            if to_memory:
                self._put_in_memory(name, waiting)
            return False
        return to_memory or (self._disk is not None and not self._disk.has(name))

    def use(self, names: Sequence[bytes]) -> None:
        """A prompt begins with these chunks, wherever they are: files of them shall stay."""
        if self._disk is None or not names:
            return
        with self._lock:
            waits = bool(self._used)
            for name in reversed(names):
                self._used.pop(name, None)
                self._used[name] = None
            if not waits:
                self._writes.append(self._writer.submit(self._tell_used))

    def _tell_used(self) -> None:
        with self._lock:
            names, self._used = list(self._used), {}
        if self._disk is not None:
            self._disk.use(names)

    # Moving.

    def later(self, work: Callable[[], Result]) -> Future[Result]:
        """What `work` returns, when all that was asked for before has been done."""
        return self._mover.submit(work)

    def announce(self, names: Sequence[bytes]) -> None:
        """These will be put by something that is done `later`: they are found already."""
        with self._lock:
            self._coming.update(names)

    def put(self, name: bytes, chunk: np.ndarray, *, evicted: bool) -> None:
        """Keeps an announced chunk, uint8: one that is evicted in memory, others, and what memory
        has no room for, on the disk."""
        with self._lock:
            evicted = evicted or name in self._evicted
            self._forget_coming(name)
        if evicted and self._host.most:
            self._put_in_memory(name, chunk)
        else:
            self._write_later(name, chunk)

    def _put_in_memory(self, name: bytes, chunk: np.ndarray) -> None:
        """With what it has no room for written to the disk."""
        with self._lock:
            gone = self._host.put(name, chunk)
            self._moved.kept[Tier.HOST] += 1
        for old_name, old in gone:
            self._write_later(old_name, old)

    def give_up(self, names: Sequence[bytes], failure: str = "") -> None:
        """Announced chunks will not come: nobody wants them any longer, or because of a failure."""
        with self._lock:
            for name in names:
                self._forget_coming(name)
                if failure:
                    self._moved.failures[failure] += 1

    def expect_no_more(self) -> None:
        """What has been announced, and is not there when all that was asked for has been done, will
        not come."""

        def forget() -> None:
            with self._lock:
                self._coming.clear()
                self._evicted.clear()

        if not self._closed:
            self.later(forget)

    def get(self, name: bytes) -> tuple[np.ndarray, Tier]:
        """A chunk's bytes, and where they were.

        Raises:
          Unreadable: when it is not there any longer, or damaged.
        """
        with self._lock:
            chunk = self._host.use(name)
            if chunk is None:
                chunk = self._waiting.get(name)
        if chunk is not None:
            return chunk, Tier.HOST
        try:
            if self._disk is None:
                raise Unreadable("gone")
            return self._disk.read(name), Tier.DISK
        except Unreadable as error:
            with self._lock:
                self._moved.failures[f"read: {error.reason}"] += 1
            raise

    def settle(self) -> None:
        """Waits until everything has come to where it goes."""
        self.later(lambda: None).result()
        while self._writes:
            self._writes.popleft().result()

    def forget(self) -> None:
        """Nothing that was put before is found again, in files of this namespace neither."""
        self._forget_memory()
        if self._disk is not None:
            self._try(self._disk.clear, "remove")

    def rename(self, open_disk: Callable[[], DiskTier | None] | None) -> None:
        """Forgets what is in memory, and keeps what comes in another tier of the disk, or none."""
        self._forget_memory()
        self._disk = None if open_disk is None else self._try(open_disk, "open")

    def _forget_memory(self) -> None:
        self.settle()
        with self._lock:
            self._host.clear()
            self._coming.clear()

    def close(self) -> None:
        """Writes what waits to be written, and gives up what is in memory. Harmless when done
        twice, or again where it was broken off."""
        if not self._closed:
            self.settle()
        self._closed = True
        self._mover.shutdown()
        self._writer.shutdown()
        self._host.clear()

    def _forget_coming(self, name: bytes) -> None:
        self._evicted.discard(name)
        self._coming[name] -= 1
        if self._coming[name] <= 0:
            del self._coming[name]

    def _write_later(self, name: bytes, chunk: np.ndarray) -> None:
        if self._disk is None or self._disk.has(name):
            return
        with self._lock:
            if name in self._waiting:
                return
            if len(self._waiting) >= self._most_waiting:
                self._moved.dropped += 1
                return
            self._waiting[name] = chunk
            while self._writes and self._writes[0].done():
                self._writes.popleft()
            self._writes.append(self._writer.submit(self._write, name, chunk))

    def _write(self, name: bytes, chunk: np.ndarray) -> None:
        disk = self._disk
        assert disk is not None, "there is one to write to"
        written = None
        try:
            written = self._try(lambda: disk.write(name, chunk), "write")
        finally:
            with self._lock:
                self._waiting.pop(name, None)
                self._moved.kept[Tier.DISK] += bool(written)

    def _try(self, work: Callable[[], Result], what: str) -> Result | None:
        """What it returns; None when the disk fails, which is counted."""
        try:
            return work()
        except OSError as error:
            with self._lock:
                self._moved.failures[f"{what}: {words_of(error)}"] += 1
            return None
