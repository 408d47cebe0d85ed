"""ChunkAllocator: ids are handed out once, given back once, and refusals change nothing."""

from __future__ import annotations

import pytest

from jax_chunkattn.tree.allocator import ChunkAllocator, PoolExhausted


def test_every_chunk_is_handed_out_once():
    allocator = ChunkAllocator(5)
    chunk_ids = allocator.allocate(2) + allocator.allocate(0) + allocator.allocate(3)
    assert sorted(chunk_ids) == [0, 1, 2, 3, 4]
    assert allocator.free_count == 0
    allocator.check()


def test_same_calls_give_same_ids():
    def ids() -> list[int]:
        allocator = ChunkAllocator(8)
        first = allocator.allocate(5)
        allocator.free([first[1], first[3]])
        return first + allocator.allocate(4)

    assert ids() == ids()


def test_freed_chunks_are_reused_before_unused_ones():
    allocator = ChunkAllocator(8)
    chunk_ids = allocator.allocate(3)
    allocator.free(chunk_ids[1:])
    assert sorted(allocator.allocate(2)) == sorted(chunk_ids[1:])
    allocator.check()


def test_exhaustion_changes_nothing():
    allocator = ChunkAllocator(4)
    allocator.free(allocator.allocate(3)[:1])
    with pytest.raises(PoolExhausted, match="3 chunks asked for, 2 free of 4"):
        allocator.allocate(3)
    assert allocator.free_count == 2
    assert len(allocator.allocate(2)) == 2
    allocator.check()


@pytest.mark.parametrize("wrong", [[1, 7], [1, -1], [1, 1], [1, 3]])
def test_bad_free_changes_nothing(wrong: list[int]):
    allocator = ChunkAllocator(5)
    allocator.allocate(4)
    allocator.free([3])
    with pytest.raises(ValueError, match=r"named twice|not allocated"):
        allocator.free(wrong)
    assert allocator.is_allocated(1)
    assert allocator.free_count == 2
    allocator.check()


@pytest.mark.parametrize("num_chunks", [0, -1, 2**31])
def test_impossible_pool_is_refused(num_chunks: int):
    with pytest.raises(ValueError, match="num_chunks"):
        ChunkAllocator(num_chunks)


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match="cannot allocate -1"):
        ChunkAllocator(3).allocate(-1)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda allocator: allocator._freed.append(allocator._freed[0]), "twice"),
        (lambda allocator: allocator._freed.append(0), "both free and allocated"),
        (lambda allocator: allocator._freed.pop(), "add up"),
        (lambda allocator: setattr(allocator, "_first_unused", 2), "never handed out"),
    ],
)
def test_check_names_what_broke(break_it, message: str):
    allocator = ChunkAllocator(4)
    allocator.free(allocator.allocate(3)[1:2])
    allocator.check()
    break_it(allocator)
    with pytest.raises(AssertionError, match=message):
        allocator.check()
