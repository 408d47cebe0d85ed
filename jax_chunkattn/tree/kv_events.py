"""What a prefix tree's cache gains and loses, as events that a router can follow.

Events say what vLLM's do (`vllm/distributed/kv_events.py`): of blocks, our sealed chunks, that were
stored or removed, each named by a hash of all tokens up to its end. A tree tells a `ChunkObserver`
about nodes; `KVEvents` is the one that makes events of it.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jax_chunkattn.tree.nodes import TOKEN_BYTES, Node, Root, encode_tokens

MOST_WAITING = 1 << 16


@dataclass(frozen=True)
class BlockStored:
    """Chunks whose keys and values are in the pool and can be found, each behind the one before.

    Attributes:
      block_hashes: of each, 64 bits.
      parent_block_hash: of the chunk before the first; None at the beginning of a prompt.
      token_ids: of all of them, in order.
      block_size: tokens of a chunk, C.
      salt: the namespace that keeps them from others.
    """

    block_hashes: tuple[int, ...]
    parent_block_hash: int | None
    token_ids: tuple[int, ...]
    block_size: int
    salt: bytes = b""


@dataclass(frozen=True)
class BlockRemoved:
    """Chunks that are not there any longer."""

    block_hashes: tuple[int, ...]


@dataclass(frozen=True)
class AllBlocksCleared:
    """Nothing that was stored before is there any longer."""


KVEvent = BlockStored | BlockRemoved | AllBlocksCleared


class ChunkObserver(Protocol):
    """What a tree tells of its computed nodes, in the midst of a change: it must not raise."""

    def stored(self, node: Node) -> None:
        """The node can be found, and its keys and values are there; so are those above it."""
        ...

    def evicting(self, node: Node) -> None:
        """It will be removed for want of room. Its chunk is as it was until the pool is next
        written."""
        ...

    def removed(self, node: Node) -> None:
        """It is gone; all below it are."""
        ...

    def cleared(self) -> None:
        """Nothing that the tree holds will be found again."""
        ...


def hash_salt(salt: bytes) -> int:
    """What the first chunk of a namespace is hashed with."""
    return _hash(b"\0" + salt) if salt else 0


def hash_chunk(above: int, chunk: bytes) -> int:
    """The hash of a chunk: of its tokens, as int32 bytes, and the hash of all before it."""
    return _hash(above.to_bytes(8, "little") + chunk)


def hash_chunks(
    tokens: Iterable[int] | np.ndarray, chunk_size: int, salt: bytes = b""
) -> list[int]:
    """The hash of each whole chunk of some tokens, the same in all processes: 64 bits of BLAKE2b.

    Raises ValueError on bad tokens.
    """
    encoded, size = encode_tokens(tokens), chunk_size * TOKEN_BYTES
    above, hashes = hash_salt(salt), []
    for end in range(size, len(encoded) + 1, size):
        above = hash_chunk(above, encoded[end - size : end])
        hashes.append(above)
    return hashes


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class _Stored:
    """A chunk that can be found, by what names it."""

    block_hash: int
    parent: int | None
    node: Node
    salt: bytes


class KVEvents:
    """Keeps what happened in a tree until somebody takes it. An engine takes one as `kv_events`.

    `take` may be called from any thread, while the engine works. When nobody does, no more than
    `most_waiting` chunks wait, or twice as many as are stored: then what waits is dropped, and
    whoever comes is told that all was cleared, and what is stored now.

    What is pending, in tails, or in other memory than the pool's, is not told of. Where heads with
    windows have chunks of their own (`tree.windowed_chunks`), events are of the other heads': a
    prompt may be found less far.
    """

    def __init__(self, *, most_waiting: int = MOST_WAITING):
        """Raises ValueError when `most_waiting` is below 1."""
        if most_waiting < 1:
            raise ValueError(f"most_waiting must be at least 1, got {most_waiting}")
        self._most_waiting = most_waiting
        self._waiting: deque[_Stored | int | None] = deque()  # stored, removed, all cleared
        self._stored: dict[int, _Stored] = {}  # by chunk id; those above before those below

    def __len__(self) -> int:
        """Chunks that can be found."""
        return len(self._stored)

    def take(self) -> list[KVEvent]:
        """What has happened since it was last called, in order; runs of chunks are one event."""
        taken = []
        for _ in range(len(self._waiting)):
            try:
                taken.append(self._waiting.popleft())
            except IndexError:  # dropped meanwhile, for what is stored now
                break
        return list(_in_runs(taken))

    def stored(self, node: Node) -> None:
        parent, salt = node.parent, b""
        if isinstance(parent, Root):
            if parent.retired:
                return
            salt = parent.salt
            above, parent_hash = hash_salt(salt), None
        else:
            assert parent is not None
            known = self._stored.get(parent.chunk_id)
            if known is None:
                return  # of before all was cleared
            above = parent_hash = known.block_hash
            salt = known.salt
        block_hash = hash_chunk(above, node.key[8:])
        stored = _Stored(block_hash, parent_hash, node, salt)
        self._stored[node.chunk_id] = stored
        self._add(stored)

    def evicting(self, node: Node) -> None:
        pass

    def removed(self, node: Node) -> None:
        known = self._stored.get(node.chunk_id)
        if known is not None and known.node is node:
            del self._stored[node.chunk_id]
            self._add(known.block_hash)

    def cleared(self) -> None:
        self._stored.clear()
        self._waiting.clear()
        self._waiting.append(None)

    def _add(self, change: _Stored | int) -> None:
        self._waiting.append(change)
        if len(self._waiting) > max(self._most_waiting, 2 * len(self._stored)):
            self._waiting.clear()
            self._waiting.append(None)
            self._waiting.extend(self._stored.values())


def _in_runs(changes: Iterable[_Stored | int | None]) -> Iterable[KVEvent]:
    """Events of changes; chunks stored each behind the one before, or removed, are one."""
    run: list[_Stored] = []
    removed: list[int] = []
    for change in changes:
        if run and not (isinstance(change, _Stored) and change.parent == run[-1].block_hash):
            yield _stored_event(run)
            run = []
        if removed and not isinstance(change, int):
            yield BlockRemoved(tuple(removed))
            removed = []
        if change is None:
            yield AllBlocksCleared()
        elif isinstance(change, int):
            removed.append(change)
        else:
            run.append(change)
    if run:
        yield _stored_event(run)
    if removed:
        yield BlockRemoved(tuple(removed))


def _stored_event(run: list[_Stored]) -> BlockStored:
    tokens = b"".join(stored.node.key[8:] for stored in run)
    return BlockStored(
        tuple(stored.block_hash for stored in run),
        run[0].parent,
        tuple(np.frombuffer(tokens, np.int32).tolist()),
        len(tokens) // TOKEN_BYTES // len(run),
        run[0].salt,
    )
