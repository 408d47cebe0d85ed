"""What the prefix tree is made of: roots, nodes, the sequences that use them, and match results."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

TOKEN_BYTES = 4
_MAX_TOKEN = 2**31 - 1


def encode_tokens(tokens: Iterable[int] | np.ndarray) -> bytes:
    """Token ids as int32 bytes, the form in which the tree compares them.

    Raises ValueError when ``tokens`` is empty, not one-dimensional, or holds anything other than
    integers in ``[0, 2**31)``.
    """
    if isinstance(tokens, np.ndarray):
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise ValueError(
                f"tokens must be a 1-d integer array, got {tokens.dtype} of shape {tokens.shape}"
            )
        if tokens.size and tokens.max() > _MAX_TOKEN:
            raise ValueError(f"token id {tokens.max()} does not fit in int32")
        lowest = int(tokens.min()) if tokens.size else 0
        encoded = tokens.astype(np.int32).tobytes()
    else:
        tokens = tuple(tokens)
        try:
            encoded = struct.pack(f"{len(tokens)}i", *tokens)  # twice as fast as through numpy
        except struct.error as error:
            raise ValueError(f"tokens must be integers that fit in int32: {error}") from None
        lowest = int(np.frombuffer(encoded, np.int32).min()) if tokens else 0
    if not encoded:
        raise ValueError("tokens must not be empty")
    if lowest < 0:
        raise ValueError(f"token ids must not be negative, got {lowest}")
    return encoded


class Root:
    """The empty prefix of one salt."""

    __slots__ = ("chunk_id", "computed_children", "references", "retired", "salt")

    def __init__(self, chunk_id: int, salt: bytes):
        self.chunk_id = chunk_id  # no chunk at all: a number no chunk and no other root has
        self.salt = salt
        self.computed_children: Node | list[Node] | None = None  # as a node's
        self.references = 0  # sequences of this salt, and nodes directly below
        self.retired = False  # after a reset: in use, but never matched nor cached again


class Node:
    """A sealed chunk; the path from the root to it is a token prefix.

    Small on purpose: a node has no table of children, because the tree keeps one table for all of
    them, keyed by ``key``: the parent's chunk id followed by this chunk's tokens. What it has is a
    list of the computed ones, in the order of their keys, and only if there are several.
    """

    __slots__ = (
        "chunk_id", "computed", "computed_children", "key", "next", "parent", "previous",
        "references",
    )  # fmt: skip

    def __init__(self, chunk_id: int, key: bytes, parent: Node | Root | None):
        self.chunk_id = chunk_id
        self.key = key
        self.parent = parent
        self.references = 0  # sequences whose path goes through here; 0 means cached
        self.computed = False  # False: pending, keys and values are not in the pool yet
        self.computed_children: Node | list[Node] | None = None  # see `tree.children`
        self.previous: Node | None = None  # neighbours in the eviction order while cached
        self.next: Node | None = None


def num_computed(nodes: list[Node]) -> int:
    """How many of a path's nodes are computed: they come first, so count from the end."""
    count = len(nodes)
    while count and not nodes[count - 1].computed:
        count -= 1
    return count


@dataclass(frozen=True)
class Match:
    """The longest prefix, in whole chunks, that the tree holds of some tokens.

    ``num_computed_tokens`` of the ``num_tokens`` have their keys and values in the pool; the rest
    are pending: another sequence, inserted earlier, is to compute them. ``num_copyable_tokens``
    more, less than a chunk, could be copied from a computed chunk that begins like the next one.
    """

    chunk_ids: tuple[int, ...]
    num_tokens: int
    num_computed_tokens: int
    num_copyable_tokens: int


@dataclass(frozen=True)
class PartialCopy:
    """A copy that the caller of ``insert`` must make on the device: the beginning of a chunk.

    The first ``num_tokens`` tokens of ``source_chunk`` are to be the first of
    ``destination_chunk``; what lands behind them does not matter, so a whole chunk may be copied.

    Nothing protects the source. The insert that chose it may have evicted it, and handed it out
    again: to another sequence, to this one, even as the destination. What it holds is right until
    the pool is next written, so the copy comes before that. Copies of several inserts may be done
    by one program if nothing was written between the inserts and the program reads every source
    before it writes a destination: a source is computed, hence was written before the first of
    these inserts, and no sequence's destination is another's.

    If the sequence is released before its copy is done, the copy must be dropped: the destination
    may already be another's.
    """

    source_chunk: int
    destination_chunk: int
    num_tokens: int


class SequenceHandle:
    """One sequence in the tree: shared sealed chunks, then private ones. Read it, never write it.

    ``chunk_ids`` lists the sealed chunks (``nodes``), the tail, and the chunks reserved ahead, in
    token order: token ``t`` lives in ``chunk_ids[t // chunk_size]``. ``tail`` holds the tokens past
    the last sealed chunk as int32 bytes; ``num_computed_tail_tokens`` of them have their keys and
    values in the pool. ``chunk_table`` is ``chunk_ids`` again, as int32, for the planner: it would
    spend a third of its time on converting lists.

    ``num_cached_tokens`` counts the tokens that were there when the sequence came: computed, to be
    computed by an earlier one, or to be copied; what is left to compute *now* is told by
    ``PrefixTree.computed_tokens``. ``copy`` is what ``insert`` asks to be copied, done or not.

    Where heads with windows have chunks of their own (`tree.windowed_chunks`), ``windowed`` are the
    columns, beside the first, of which it holds those, and ``window_copies`` what ``insert`` or
    ``fork`` asks to be copied there, as source and destination. ``num_matched_tokens`` counts, in
    whole chunks, the tokens that were there for the other heads when it came.
    """

    __slots__ = (
        "chunk_ids", "chunk_table", "copy", "nodes", "num_cached_tokens",
        "num_computed_tail_tokens", "num_matched_tokens", "num_tokens", "path", "root", "tail",
        "window_copies", "windowed",
    )  # fmt: skip

    def __init__(self, root: Root, nodes: list[Node], tail: bytes):
        self.root = root
        self.nodes = nodes
        self.tail = tail
        self.chunk_ids = [node.chunk_id for node in nodes]
        self.chunk_table = array("i", self.chunk_ids)
        self.path = encode_path(self.chunk_ids)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_matched_tokens = 0
        self.num_computed_tail_tokens = 0
        self.copy: PartialCopy | None = None
        self.windowed = range(0)
        self.window_copies: list[tuple[int, int]] = []

    @property
    def salt(self) -> bytes:
        return self.root.salt

    @property
    def num_tail_tokens(self) -> int:
        """Tokens past the last sealed chunk: in chunks that are this sequence's alone."""
        return len(self.tail) // TOKEN_BYTES

    @property
    def private_chunk_ids(self) -> list[int]:
        """The tail's chunks and the reserved ones."""
        return self.chunk_ids[len(self.nodes) :]

    def add_chunks(self, chunk_ids: Sequence[int]) -> None:
        """Puts chunks at the end."""
        self.chunk_ids.extend(chunk_ids)
        self.chunk_table.extend(chunk_ids)

    def replace_chunk(self, position: int, chunk_id: int) -> None:
        self.chunk_ids[position] = self.chunk_table[position] = chunk_id


def encode_path(chunk_ids: Iterable[int]) -> bytes:
    """Chunk ids as bytes that sort as the ids do: a parent before its children, by id."""
    return np.fromiter(chunk_ids, ">u4").tobytes()


def computed_tokens(sequence: SequenceHandle, chunk_size: int) -> int:
    """Tokens from the start of a sequence that are computed now, or brought by its own copy."""
    nodes, copy = sequence.nodes, sequence.copy
    computed = num_computed(nodes)
    num_tokens = computed * chunk_size
    if computed == len(nodes):
        return num_tokens + sequence.num_computed_tail_tokens
    if copy is not None and copy.destination_chunk == nodes[computed].chunk_id:
        return num_tokens + copy.num_tokens
    return num_tokens
