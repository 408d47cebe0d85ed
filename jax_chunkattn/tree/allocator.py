"""Which chunks of the pool are taken: a list of ids and nothing else."""

from __future__ import annotations

from collections.abc import Sequence


class PoolExhausted(RuntimeError):
    """The pool has too few chunks, free or evictable, for what was asked; nothing was changed."""


class ChunkAllocator:
    """Hands out chunk ids in ``[0, num_chunks)``.

    Deterministic: the same calls give the same ids. Chunks freed last are reused first, and ids
    that were never used are taken in ascending order, so a pool that is not full stays compact.
    Every operation costs O(1) per chunk and building the allocator costs one byte per chunk.
    """

    def __init__(self, num_chunks: int):
        """Raises ValueError unless ``1 <= num_chunks < 2**31`` (ids travel as int32)."""
        if not 1 <= num_chunks < 2**31:
            raise ValueError(f"num_chunks must be in [1, 2**31), got {num_chunks}")
        self.num_chunks = num_chunks
        self._allocated = bytearray(num_chunks)
        self._freed: list[int] = []
        self._first_unused = 0

    @property
    def free_count(self) -> int:
        """Chunks that can be allocated now."""
        return self.num_chunks - self._first_unused + len(self._freed)

    def is_allocated(self, chunk_id: int) -> bool:
        """Whether ``chunk_id`` is in the pool and handed out."""
        return 0 <= chunk_id < self.num_chunks and bool(self._allocated[chunk_id])

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` chunks.

        Raises PoolExhausted, before any change, when fewer are free; ValueError when ``count`` is
        negative.
        """
        if count < 0:
            raise ValueError(f"cannot allocate {count} chunks")
        if count > self.free_count:
            raise PoolExhausted(
                f"{count} chunks asked for, {self.free_count} free of {self.num_chunks}"
            )
        reused = min(count, len(self._freed))
        chunk_ids = self._freed[len(self._freed) - reused :][::-1]
        del self._freed[len(self._freed) - reused :]
        fresh_end = self._first_unused + count - reused
        chunk_ids.extend(range(self._first_unused, fresh_end))
        self._first_unused = fresh_end
        for chunk_id in chunk_ids:
            self._allocated[chunk_id] = 1
        return chunk_ids

    def free(self, chunk_ids: Sequence[int]) -> None:
        """Gives chunks back.

        Raises ValueError, before any change, when one of them is not allocated (freed twice, or
        not of this pool) or is named twice.
        """
        if len(chunk_ids) > 1 and len(set(chunk_ids)) != len(chunk_ids):
            raise ValueError(f"a chunk is named twice in {list(chunk_ids)}")
        for chunk_id in chunk_ids:
            if not self.is_allocated(chunk_id):
                raise ValueError(
                    f"chunk {chunk_id} is not allocated (freed twice, or not of this pool of "
                    f"{self.num_chunks})"
                )
        for chunk_id in chunk_ids:
            self._allocated[chunk_id] = 0
        self._freed.extend(chunk_ids)

    def check(self) -> None:
        """Raises AssertionError naming the first invariant that does not hold; O(num_chunks)."""
        freed = set(self._freed)
        if len(freed) != len(self._freed):
            raise AssertionError("allocator: a chunk is in the free list twice")
        if any(self._allocated[chunk_id] for chunk_id in freed):
            raise AssertionError("allocator: a chunk is both free and allocated")
        if any(self._allocated[self._first_unused :]):
            raise AssertionError("allocator: a chunk that was never handed out is allocated")
        if self._allocated.count(1) + self.free_count != self.num_chunks:
            raise AssertionError("allocator: free and allocated chunks do not add up to the pool")
