"""The prefix tree: which chunk holds which tokens, who uses it, and what may be evicted.

After ChunkAttention (Ye et al., ACL 2024, arXiv 2402.15220, section 3.1), with what the paper
leaves out: chunks stay cached when their last sequence leaves, salts keep tenants apart, and a full
pool changes nothing. Host only: it deals in chunk ids and never touches the device.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jax_chunkattn.tree.allocator import ChunkAllocator, PoolExhausted
from jax_chunkattn.tree.children import children_of, closest_child, remove_child, set_computed
from jax_chunkattn.tree.eviction import RecencyList
from jax_chunkattn.tree.invariants import check_tree
from jax_chunkattn.tree.nodes import (
    TOKEN_BYTES,
    Match,
    Node,
    PartialCopy,
    Root,
    SequenceHandle,
    encode_tokens,
    num_computed,
)


class PrefixTree:
    """Prefixes of token sequences in whole chunks over a pool of ``num_chunks`` chunks.

    A chunk is *free*, *in use* (on the path of a sequence, or private to one) or *cached* (sealed,
    in no sequence, kept for a later match): ``free_count + in_use_count + cached_count`` is always
    ``num_chunks``. Every operation costs O(chunks of the sequence it is about), whatever the size
    of the tree. The number of children of a node adds a binary search where a prompt diverges and
    where a chunk comes or goes, and there the moving of its siblings' pointers.

    Life of a sequence: `insert` creates its nodes as *pending*; the caller computes what
    `computed_tokens` says is missing and reports it with `mark_computed`; then, again and again,
    `reserve` room, let the device write, `append` what it wrote; finally `release`.

    Pending nodes match at once, so that requests arriving together share them. A pending node is
    owed by all the sequences on it: whichever is computed first, in the order of insertion unless
    there is a reason, computes it for the others, and if that one is released before, the next
    finds it missing in its own `computed_tokens`. When its last sequence leaves, a pending node is
    removed, never cached. So aborting is releasing.

    ``retain=False`` is the paper's policy: chunks are freed when their last sequence leaves.

    ``version`` changes whenever the rows or their chunk ids do; a plan made at one version is good
    until it does. Not thread-safe.
    """

    def __init__(self, num_chunks: int, chunk_size: int, *, retain: bool = True):
        """Raises ValueError when ``num_chunks`` or ``chunk_size`` is below 1."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.num_chunks = num_chunks
        self.chunk_size = chunk_size
        self.retain = retain
        self.version = 0
        self.num_evicted = 0  # chunks evicted since the tree was made
        self._allocator = ChunkAllocator(num_chunks)
        self._chunk_bytes = chunk_size * TOKEN_BYTES
        self._nodes: dict[bytes, Node] = {}
        self._cached = RecencyList()
        self._roots: dict[bytes, Root] = {}
        self._next_root_id = num_chunks
        self._sequences: dict[SequenceHandle, None] = {}
        self._rows: list[SequenceHandle] | None = None

    # Sizes, all O(1).

    @property
    def free_count(self) -> int:
        """Chunks that hold nothing."""
        return self._allocator.free_count

    @property
    def cached_count(self) -> int:
        """Chunks in no sequence, kept to be matched; all of them can be evicted."""
        return len(self._cached)

    @property
    def in_use_count(self) -> int:
        """Chunks that some sequence holds: sealed, tail or reserved."""
        return self.num_chunks - self.free_count - self.cached_count

    @property
    def num_nodes(self) -> int:
        """Sealed chunks, in use or cached."""
        return len(self._nodes)

    # Reading.

    def match(self, tokens: Iterable[int] | np.ndarray, salt: bytes = b"") -> Match:
        """The longest prefix of ``tokens``, in whole chunks, present under ``salt``.

        Changes nothing, the eviction order included. Raises ValueError on bad tokens.
        """
        encoded, root = encode_tokens(tokens), self._roots.get(salt)
        nodes = self._walk(root, encoded)
        return Match(
            chunk_ids=tuple(node.chunk_id for node in nodes),
            num_tokens=len(nodes) * self.chunk_size,
            num_computed_tokens=num_computed(nodes) * self.chunk_size,
            num_copyable_tokens=self._find_donor(root, nodes, encoded)[1],
        )

    def room_after_insert(self, tokens: Iterable[int] | np.ndarray, salt: bytes = b"") -> int:
        """Chunks that would be left, free or evictable, if ``tokens`` were inserted.

        Negative when that would be refused. Changes nothing. Raises ValueError on bad tokens.
        """
        encoded = encode_tokens(tokens)
        nodes = self._walk(self._roots.get(salt), encoded)
        needed = -(-len(encoded) // self._chunk_bytes) - len(nodes)
        return self.free_count + self._num_evictable(nodes) - needed

    def computed_tokens(self, sequence: SequenceHandle) -> int:
        """Tokens from the start of ``sequence`` whose keys and values are in the pool *now*.

        This, read when the prefill starts, is where it starts. It may be less than
        ``num_cached_tokens``, if a sequence that owed a part was released, or more, if another
        computed a part meanwhile, and it may equal ``num_tokens``. What ``sequence.copy`` brings
        counts from the start, for this sequence only: another that shares the pending chunk owes
        all of it, since the copy is dropped if this one is released first.
        """
        self._require_active(sequence)
        nodes, copy = sequence.nodes, sequence.copy
        computed = num_computed(nodes)
        num_tokens = computed * self.chunk_size
        if computed == len(nodes):
            return num_tokens + sequence.num_computed_tail_tokens
        if copy is not None and copy.destination_chunk == nodes[computed].chunk_id:
            return num_tokens + copy.num_tokens
        return num_tokens

    def rows(self) -> list[SequenceHandle]:
        """Active sequences in depth-first order: those under any node are one contiguous range.

        Children follow in the order of their chunk ids, sequences that end at a node come before
        its children, and equal paths keep the order of insertion.
        """
        if self._rows is None:
            self._rows = sorted(self._sequences, key=lambda sequence: sequence.path)
        return list(self._rows)

    # Sequences.

    def insert(
        self,
        tokens: Iterable[int] | np.ndarray,
        salt: bytes = b"",
        *,
        copy_partial: bool = False,
    ) -> SequenceHandle:
        """Starts a sequence: shares the chunks that match, makes pending ones for the rest.

        Full chunks become nodes at once; the remainder, if any, gets a private tail chunk. Evicts
        cached chunks when too few are free. Two different salts never share anything.

        With ``copy_partial``, the first chunk that is not shared takes over what it has in common
        with the computed chunk, in its place, that begins most like it: the caller must carry out
        the sequence's ``copy``, under the rules of `PartialCopy`. The donor's place in the order of
        eviction stays.

        Raises ValueError on bad tokens and PoolExhausted when the pool is too small or too much of
        it is in use; nothing has changed then.
        """
        encoded = encode_tokens(tokens)
        num_tokens = len(encoded) // TOKEN_BYTES
        root = self._roots.get(salt)
        nodes = self._walk(root, encoded)
        needed = self._num_chunks_for(num_tokens) - len(nodes)
        self._require_available(needed, keeping=nodes)

        donor, num_copied = self._find_donor(root, nodes, encoded) if copy_partial else (None, 0)
        if root is None:
            root = self._roots[salt] = Root(self._next_root_id, salt)
            self._next_root_id += 1
        root.references += 1  # before anything is evicted: an emptied root would be dropped
        num_matched = len(nodes)
        for node in nodes:
            self._take(node)
        try:
            chunk_ids = self._allocate(needed)
        except BaseException:
            self._leave(nodes, root)
            raise
        sealed_bytes = num_tokens // self.chunk_size * self._chunk_bytes
        first_new = num_matched * self._chunk_bytes
        for index, begin in enumerate(range(first_new, sealed_bytes, self._chunk_bytes)):
            parent = nodes[-1] if nodes else root
            chunk = encoded[begin : begin + self._chunk_bytes]
            nodes.append(self._add_node(parent, chunk, chunk_ids[index]))
        sequence = SequenceHandle(root, nodes, tail=encoded[sealed_bytes:])
        sequence.add_chunks(chunk_ids[len(nodes) - num_matched :])
        sequence.num_tokens = num_tokens
        sequence.num_cached_tokens = num_matched * self.chunk_size + num_copied
        if donor is not None:
            sequence.copy = PartialCopy(donor.chunk_id, chunk_ids[0], num_copied)
            if len(nodes) == num_matched:
                sequence.num_computed_tail_tokens = num_copied
        self._activate(sequence)
        return sequence

    def mark_computed(self, sequence: SequenceHandle, num_tokens: int) -> None:
        """Records that keys and values of the first ``num_tokens`` tokens are in the pool.

        Marking fewer than before takes nothing back. Raises ValueError when ``num_tokens`` is not
        in ``[0, sequence.num_tokens]``.
        """
        self._require_active(sequence)
        if not 0 <= num_tokens <= sequence.num_tokens:
            raise ValueError(f"{num_tokens} tokens computed of {sequence.num_tokens}")
        first_pending = num_computed(sequence.nodes)
        for node in sequence.nodes[first_pending : num_tokens // self.chunk_size]:
            set_computed(node)
        in_tail = num_tokens - len(sequence.nodes) * self.chunk_size
        sequence.num_computed_tail_tokens = max(sequence.num_computed_tail_tokens, in_tail)

    def reserve(self, sequence: SequenceHandle, num_tokens: int) -> bool:
        """Makes room for ``num_tokens`` more tokens in private chunks; True if chunks were added.

        Raises ValueError when ``num_tokens`` is negative and PoolExhausted when the pool cannot
        give the chunks; nothing has changed then.
        """
        self._require_active(sequence)
        if num_tokens < 0:
            raise ValueError(f"cannot reserve {num_tokens} tokens")
        needed = self._num_chunks_for(sequence.num_tokens + num_tokens) - len(sequence.chunk_ids)
        if needed <= 0:
            return False
        self._require_available(needed)
        sequence.add_chunks(self._allocate(needed))
        self.version += 1
        return True

    def append(self, sequence: SequenceHandle, tokens: Iterable[int] | np.ndarray) -> bool:
        """Records tokens whose keys and values the device has written behind the sequence's last.

        A tail chunk that fills is sealed and can be matched. If a computed node with the same
        tokens exists in the same place, the sequence moves to that node's chunk and its own is
        freed. If such a node is pending, the full chunk stays private, part of the tail, and is
        tried again at the next append.

        Returns True when a chunk was sealed: chunk ids or rows may have changed. Never allocates.
        Raises ValueError, before any change, on bad tokens, when a part of the sequence is not
        computed, and when `reserve` has not made the room.
        """
        num_computed = self.computed_tokens(sequence)
        if num_computed != sequence.num_tokens:
            raise ValueError(
                f"append to a sequence with {num_computed} of {sequence.num_tokens} tokens "
                "computed: mark_computed comes first"
            )
        encoded = encode_tokens(tokens)
        num_tokens = sequence.num_tokens + len(encoded) // TOKEN_BYTES
        capacity = len(sequence.chunk_ids) * self.chunk_size
        if num_tokens > capacity:
            raise ValueError(
                f"append makes {num_tokens} tokens, the chunks hold {capacity}: reserve comes first"
            )
        sequence.tail += encoded
        sequence.num_tokens = num_tokens
        sealed = False
        while len(sequence.tail) >= self._chunk_bytes and self._seal(sequence):
            sealed = True
        sequence.num_computed_tail_tokens = sequence.num_tail_tokens
        if sealed:
            self.version += 1
            self._rows = None
        return sealed

    def fork(self, sequence: SequenceHandle) -> tuple[SequenceHandle, list[tuple[int, int]]]:
        """A second sequence with the same tokens; shares what is sealed and copies the tail.

        Returns it and the ``(source, destination)`` chunks that the caller must copy on the device
        before either is written again. A source may be what ``sequence.copy`` fills, so that one
        must have been carried out before this call. Room reserved by ``sequence`` is not carried
        over. Raises PoolExhausted when the pool cannot give the tail's chunks; nothing has changed
        then.
        """
        self._require_active(sequence)
        needed = self._num_chunks_for(sequence.num_tail_tokens)
        self._require_available(needed)
        destinations = self._allocate(needed)
        for node in sequence.nodes:
            self._take(node)
        sequence.root.references += 1
        copy = SequenceHandle(sequence.root, list(sequence.nodes), sequence.tail)
        copy.add_chunks(destinations)
        copy.num_tokens = sequence.num_tokens
        copy.num_computed_tail_tokens = sequence.num_computed_tail_tokens
        copy.num_cached_tokens = (
            len(copy.nodes) * self.chunk_size + sequence.num_computed_tail_tokens
        )
        self._activate(copy)
        sources = sequence.private_chunk_ids[:needed]
        return copy, list(zip(sources, destinations, strict=True))

    def is_active(self, sequence: SequenceHandle) -> bool:
        """Whether it is one of this tree's, and not released."""
        return sequence in self._sequences

    def release(self, sequence: SequenceHandle, *, keep: int | None = None) -> None:
        """Ends a sequence, finished or aborted; its handle is dead afterwards.

        Computed nodes that nobody else uses become cached, the most recently used of all; pending
        ones are removed; tail and reserved chunks are freed. With ``keep``, only as many of the
        first become cached: those behind them are freed, with what is cached below them. Raises
        ValueError when the sequence is not active in this tree (released before).
        """
        self._require_active(sequence)
        del self._sequences[sequence]
        self._rows = None
        self.version += 1
        self._allocator.free(sequence.private_chunk_ids)
        self._leave(sequence.nodes, sequence.root, keep)

    # Cached chunks.

    def evict(self, count: int) -> int:
        """Frees up to ``count`` cached chunks, least recently used and leaves first.

        Returns how many. Chunks in use are never touched.
        """
        evicted = min(count, len(self._cached))
        for _ in range(evicted):
            node = self._cached.oldest
            self._cached.remove(node)
            self._remove_node(node)
        self.num_evicted += max(evicted, 0)
        return max(evicted, 0)

    def reset(self) -> int:
        """Forgets all that is stored.

        Frees every cached chunk and returns how many. Active sequences go on as they are, but
        nothing inserted later matches what they hold, and it is freed, not cached, when they leave.
        """
        freed = self.evict(len(self._cached))
        for root in self._roots.values():
            root.retired = True
        self._roots.clear()
        return freed

    def check(self) -> None:
        """Verifies every invariant; raises AssertionError naming the first one broken."""
        check_tree(self)

    # Inside.

    def _walk(self, root: Root | None, encoded: bytes) -> list[Node]:
        nodes: list[Node] = []
        if root is None:
            return nodes
        parent: Node | Root = root
        size = self._chunk_bytes
        for begin in range(0, len(encoded) - size + 1, size):
            key = parent.chunk_id.to_bytes(8, "little") + encoded[begin : begin + size]
            node = self._nodes.get(key)
            if node is None:
                break
            nodes.append(node)
            parent = node
        return nodes

    def _find_donor(
        self, root: Root | None, nodes: list[Node], encoded: bytes
    ) -> tuple[Node | None, int]:
        """The computed node that begins most like the chunk behind ``nodes``; shared tokens."""
        parent = nodes[-1] if nodes else root
        if parent is None:
            return None, 0
        begin = len(nodes) * self._chunk_bytes
        return closest_child(parent, encoded[begin : begin + self._chunk_bytes])

    def _num_chunks_for(self, num_tokens: int) -> int:
        """Chunks that ``num_tokens`` tokens take; PoolExhausted if the pool is smaller."""
        count = -(-num_tokens // self.chunk_size)
        if count > self.num_chunks:
            raise PoolExhausted(
                f"{num_tokens} tokens take {count} chunks of {self.chunk_size} and can never fit "
                f"in a pool of {self.num_chunks}"
            )
        return count

    def _require_active(self, sequence: SequenceHandle) -> None:
        if not self.is_active(sequence):
            raise ValueError("the sequence is not active in this tree (released before?)")

    def _require_available(self, needed: int, keeping: list[Node] | None = None) -> None:
        """Raises PoolExhausted unless that many are free, or evictable and not in ``keeping``."""
        evictable = self._num_evictable(keeping or [])
        if needed > self.free_count + evictable:
            raise PoolExhausted(
                f"{needed} more chunks of {self.chunk_size} tokens are needed; of the pool's "
                f"{self.num_chunks}, {self.free_count} are free and {evictable} can be evicted"
            )

    def _num_evictable(self, keeping: list[Node]) -> int:
        return self.cached_count - sum(node.references == 0 for node in keeping)

    def _allocate(self, count: int) -> list[int]:
        self.evict(count - self.free_count)
        return self._allocator.allocate(count)

    def _activate(self, sequence: SequenceHandle) -> None:
        self._sequences[sequence] = None
        self._rows = None
        self.version += 1

    def _take(self, node: Node) -> None:
        if node.references == 0:
            self._cached.remove(node)
        node.references += 1

    def _leave(self, nodes: list[Node], root: Root, keep: int | None = None) -> None:
        """Takes back what `_take` and a sequence's reference to its root were."""
        if not self.retain or root.retired:
            keep = 0
        for index, node in reversed(list(enumerate(nodes))):
            node.references -= 1
            if node.references:
                continue
            if node.computed and (keep is None or index < keep):
                self._cached.push(node)
            else:
                self._evict_below(node)
                self._remove_node(node)
        self._drop_root_reference(root)

    def _evict_below(self, node: Node) -> None:
        """Frees what is cached below a node that nobody uses."""
        below = children_of(node)
        for descendant in below:
            below.extend(children_of(descendant))  # grows as it is walked
        for descendant in reversed(below):
            self._cached.remove(descendant)
            self._remove_node(descendant)

    def _add_node(self, parent: Node | Root, chunk: bytes, chunk_id: int) -> Node:
        node = Node(chunk_id, parent.chunk_id.to_bytes(8, "little") + chunk, parent)
        node.references = 1
        self._nodes[node.key] = node
        if isinstance(parent, Root):
            parent.references += 1
        return node

    def _remove_node(self, node: Node) -> None:
        del self._nodes[node.key]
        if node.computed:
            remove_child(node)
        self._allocator.free((node.chunk_id,))
        if isinstance(node.parent, Root):
            self._drop_root_reference(node.parent)

    def _drop_root_reference(self, root: Root) -> None:
        root.references -= 1
        if root.references == 0 and not root.retired:
            del self._roots[root.salt]

    def _seal(self, sequence: SequenceHandle) -> bool:
        """Makes the first private chunk, full, a node; False if a pending node is in its place."""
        parent = sequence.nodes[-1] if sequence.nodes else sequence.root
        chunk = sequence.tail[: self._chunk_bytes]
        position = len(sequence.nodes)
        own_chunk_id = sequence.chunk_ids[position]
        node = self._nodes.get(parent.chunk_id.to_bytes(8, "little") + chunk)
        if node is None:
            node = self._add_node(parent, chunk, own_chunk_id)
            set_computed(node)
        elif node.computed:
            self._take(node)
            self._allocator.free((own_chunk_id,))
            sequence.replace_chunk(position, node.chunk_id)
        else:
            return False
        sequence.nodes.append(node)
        sequence.path += node.chunk_id.to_bytes(4, "big")
        sequence.tail = sequence.tail[self._chunk_bytes :]
        return True
