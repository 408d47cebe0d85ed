"""The prefix tree: which chunk holds which tokens, who uses it, and what may be evicted.

After ChunkAttention (Ye et al., ACL 2024, arXiv 2402.15220, section 3.1), with what the paper
leaves out: chunks stay cached when their last sequence leaves, salts keep tenants apart, and a full
pool changes nothing. Host only: it deals in chunk ids and never touches the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.invariants import check_tree
from jax_chunkattn.tree.kv_events import ChunkObserver
from jax_chunkattn.tree.nodes import (
    TOKEN_BYTES,
    Match,
    Node,
    PartialCopy,
    Root,
    SequenceHandle,
    computed_tokens,
    encode_tokens,
    num_computed,
)
from jax_chunkattn.tree.stored_chunks import StoredChunks
from jax_chunkattn.tree.window_room import WindowRoom


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

    Pending nodes match at once, so that requests arriving together share them. Any sequence on a
    pending node may compute it for the others, normally the one inserted first; if that one is
    released before, the node is missing in the `computed_tokens` of the next. When its last
    sequence leaves, a pending node is removed, never cached. So aborting is releasing.

    ``retain=False`` is the paper's policy: chunks are freed when their last sequence leaves.

    With ``window_room``, heads with windows have fewer chunks than the others
    (`tree.windowed_chunks`), under ids of their own, `window_ids`: of each sequence what its next
    queries read. Then the caller asks for `fill` before it computes tokens. What the windows of all
    sequences have left is given up when there is need, so a prefix may be found as far only as what
    its end reads is there: the rest has nodes, and is computed once more for those heads alone.

    ``observers`` are told which chunks can be found, and which no longer (`tree.kv_events`).

    ``version`` changes whenever the rows or their chunk ids do; a plan made at one version is good
    until it does. Not thread-safe.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_size: int,
        *,
        retain: bool = True,
        window_room: WindowRoom | None = None,
        observers: Sequence[ChunkObserver] = (),
    ):
        """Raises ValueError when ``num_chunks`` or ``chunk_size`` is below 1, or there is not even
        room for one sequence's windows."""
        self._stored = StoredChunks(
            num_chunks, chunk_size, retain=retain, window_room=window_room, observers=observers
        )
        self._windows = self._stored.windows
        self.version = 0
        self._sequences: dict[SequenceHandle, None] = {}
        self._rows: list[SequenceHandle] | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks of the pool."""
        return self._stored.num_chunks

    @property
    def chunk_size(self) -> int:
        """Tokens that a chunk holds."""
        return self._stored.chunk_size

    @property
    def retain(self) -> bool:
        """Whether chunks stay cached when their last sequence leaves."""
        return self._stored.retain

    @property
    def window_room(self) -> WindowRoom | None:
        """What heads with windows have, where they have chunks of their own."""
        return self._windows.room

    @property
    def window_ids(self) -> np.ndarray | None:
        """Of each chunk its id for heads with windows, ``num_chunks`` where it has none: int32
        [num_chunks + 1]. It changes with the tree."""
        return self._windows.ids

    # Sizes, all O(1).

    @property
    def free_count(self) -> int:
        """Chunks that hold nothing."""
        return self._stored.free_count

    @property
    def cached_count(self) -> int:
        """Chunks in no sequence, kept to be matched; all of them can be evicted."""
        return len(self._stored.cached)

    @property
    def in_use_count(self) -> int:
        """Chunks that some sequence holds: sealed, tail or reserved."""
        return self.num_chunks - self.free_count - self.cached_count

    @property
    def window_in_use_count(self) -> int:
        """Chunks of heads with windows that some sequence needs, where they have their own."""
        return self._windows.in_use_count

    @property
    def num_nodes(self) -> int:
        """Sealed chunks, in use or cached."""
        return len(self._stored.nodes)

    @property
    def num_evicted(self) -> int:
        """Chunks evicted since the tree was made."""
        return self._stored.num_evicted

    # Reading.

    def nodes(self) -> list[Node]:
        """All sealed chunks, in use or cached, those first that came first."""
        return list(self._stored.nodes.values())

    def match(self, tokens: Iterable[int] | np.ndarray, salt: bytes = b"") -> Match:
        """The longest prefix of ``tokens``, in whole chunks, present under ``salt``.

        Changes nothing, the eviction order included. Raises ValueError on bad tokens.
        """
        stored = self._stored
        encoded, root = encode_tokens(tokens), stored.roots.get(salt)
        nodes = stored.walk(root, encoded)
        usable = nodes[: self._windows.usable(nodes)]
        return Match(
            chunk_ids=tuple(node.chunk_id for node in usable),
            num_tokens=len(usable) * self.chunk_size,
            num_computed_tokens=num_computed(usable) * self.chunk_size,
            num_copyable_tokens=self._find_donor(root, nodes, encoded)[1],
        )

    def room_after_insert(self, tokens: Iterable[int] | np.ndarray, salt: bytes = b"") -> int:
        """Chunks that would be left, free or evictable, if ``tokens`` were inserted.

        Negative when that would be refused. Changes nothing. Raises ValueError on bad tokens.
        """
        stored, encoded = self._stored, encode_tokens(tokens)
        if not self._windows.has_room():
            return -1
        nodes = stored.walk(stored.roots.get(salt), encoded)
        needed = -(-len(encoded) // stored.chunk_bytes) - len(nodes)
        return self.free_count + stored.num_evictable(nodes) - needed

    def computed_tokens(self, sequence: SequenceHandle) -> int:
        """Tokens from the start of ``sequence`` whose keys and values are in the pool *now*.

        This, read when the prefill starts, is where it starts. It may be less than
        ``num_cached_tokens``, if a sequence that was to compute a part was released, or more, if
        another computed a part meanwhile, and it may equal ``num_tokens``. What ``sequence.copy``
        brings counts from the start, for this sequence only: another that shares the pending chunk
        must compute all of it, since the copy is dropped if this one is released first.

        Heads with windows count as far as what the next token reads is there.
        """
        return self.begin_of(sequence, self.stored_tokens(sequence))

    def begin_of(self, sequence: SequenceHandle, position: int) -> int:
        """Where ``sequence`` may be computed from, at ``position`` at most, if heads that see all
        have what is before that: heads with windows may have given up what the token there reads.
        """
        return self._windows.begin_of(sequence, position)

    def count_windowed(self, sequence: SequenceHandle) -> int:
        """Chunks of heads with windows that a sequence needs, where they have their own."""
        return self._windows.count(sequence)

    def stored_tokens(self, sequence: SequenceHandle) -> int:
        """The same without heads with windows: tokens that must not be written again for the
        others."""
        self._require_active(sequence)
        return computed_tokens(sequence, self.chunk_size)

    def rows(self) -> list[SequenceHandle]:
        """Active sequences in depth-first order: those under any node are one contiguous range.

        Children follow in the order of their chunk ids, sequences that end at a node come before
        its children, and equal paths keep the order of insertion.
        """
        if self._rows is None:
            self._rows = sorted(self._sequences, key=lambda sequence: sequence.path)
        return list(self._rows)

    def in_order(self, some: Collection[SequenceHandle]) -> list[SequenceHandle]:
        """Those of ``some`` that are active, in the order of `rows`. When others are many, as those
        are that a search holds, they are not sorted."""
        if self._rows is None and 2 * len(some) < len(self._sequences):
            few = (sequence for sequence in self._sequences if sequence in some)
            return sorted(few, key=lambda sequence: sequence.path)
        return [sequence for sequence in self.rows() if sequence in some]

    # Sequences.

    def insert(
        self,
        tokens: Iterable[int] | np.ndarray,
        salt: bytes = b"",
        *,
        copy_partial: bool = False,
        like: SequenceHandle | None = None,
    ) -> SequenceHandle:
        """Starts a sequence: shares the chunks that match, makes pending ones for the rest.

        Full chunks become nodes at once; the remainder, if any, gets a private tail chunk. Evicts
        cached chunks when too few are free. Two different salts never share anything.

        With ``copy_partial``, the first chunk that is not shared takes over what it has in common
        with the computed chunk, in its place, that begins most like it: the caller must carry out
        the sequence's ``copy``, under the rules of `PartialCopy`. The donor's place in the order of
        eviction stays. An active sequence that is ``like`` this one may give what is computed of
        its tail, which is found in no other way.

        Raises ValueError on bad tokens and PoolExhausted when the pool is too small or too much of
        it is in use; nothing has changed then.
        """
        stored, encoded = self._stored, encode_tokens(tokens)
        num_tokens = len(encoded) // TOKEN_BYTES
        matched = stored.walk(stored.roots.get(salt), encoded)
        needed = stored.num_chunks_for(num_tokens) - len(matched)
        stored.require_available(needed, keeping=matched)
        self._require_window_room()

        donor, num_copied = None, 0
        if copy_partial:
            donor, num_copied = self._find_donor(stored.roots.get(salt), matched, encoded, like)
        places = self._windows.places([donor] if donor is not None else [])
        num_usable_tokens = self._windows.usable(matched) * self.chunk_size
        root = stored.open_root(salt)
        root.references += 1  # before anything is evicted: an emptied root would be dropped
        for node in matched:
            stored.take(node)
        try:
            chunk_ids = stored.allocate(needed)
        except BaseException:
            stored.leave(matched, root)
            raise
        nodes, size = list(matched), stored.chunk_bytes
        num_sealed = num_tokens // self.chunk_size
        for index, chunk_id in zip(range(len(matched), num_sealed), chunk_ids, strict=False):
            parent = nodes[-1] if nodes else root
            nodes.append(stored.add(parent, encoded[index * size : (index + 1) * size], chunk_id))
        sequence = SequenceHandle(root, nodes, tail=encoded[num_sealed * size :])
        sequence.add_chunks(chunk_ids[num_sealed - len(matched) :])
        sequence.num_tokens = num_tokens
        sequence.num_cached_tokens = num_usable_tokens + num_copied
        sequence.num_matched_tokens = len(matched) * self.chunk_size
        if donor is not None:
            sequence.copy = PartialCopy(donor, chunk_ids[0], num_copied)
            if len(nodes) == len(matched):
                sequence.num_computed_tail_tokens = num_copied
        self._activate(sequence)
        self._windows.enter(sequence, num_usable_tokens)
        if donor is not None:
            copies = list(zip(places, chunk_ids, strict=False))
            self._windows.copy(sequence, num_usable_tokens, sequence.num_cached_tokens, copies)
        return sequence

    def expect(self, sequence: SequenceHandle, position: int) -> None:
        """Keeps, for heads with windows, what a sequence reads that goes on from a position, and
        nothing else: others may still have to compute a part of what is before it."""
        self._require_active(sequence)
        self._windows.restart_from(sequence, position)

    def fill(self, sequence: SequenceHandle, begin: int, end: int) -> list[int]:
        """Makes room, for heads with windows, for a sequence's tokens from position ``begin`` to
        ``end``, which are computed next.

        Returns the chunks, by their place in the sequence, that had none: for those heads all of
        such a chunk is to be computed, also where the tokens count as stored for the others. Raises
        ValueError when there are more tokens than a sequence may ask room for.
        """
        self._require_active(sequence)
        return self._windows.fill(sequence, begin, end)

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
            self._stored.set_computed(node)
        in_tail = num_tokens - len(sequence.nodes) * self.chunk_size
        sequence.num_computed_tail_tokens = max(sequence.num_computed_tail_tokens, in_tail)
        self._windows.go_on_from(sequence, num_tokens)

    def awaiting(self, nodes: Sequence[Node]) -> Sequence[Node]:
        """The first of these nodes, each right below the one before, whose chunks may be filled by
        who has their keys and values: they are pending, and what is above them is computed."""
        for count, node in enumerate(nodes):
            pending = self._stored.nodes.get(node.key) is node and not node.computed
            above = node.parent
            if not pending or not (count or isinstance(above, Root) or (above and above.computed)):
                return nodes[:count]
        return nodes

    def mark_loaded(self, node: Node) -> None:
        """Records that keys and values of the first of those `awaiting` are in the pool."""
        assert self.awaiting([node]), "it is pending, behind what is computed"
        self._stored.set_computed(node)

    def reserve(self, sequence: SequenceHandle, num_tokens: int) -> bool:
        """Makes room for ``num_tokens`` more tokens in private chunks; True if chunks were added.

        Raises ValueError when ``num_tokens`` is negative and PoolExhausted when the pool cannot
        give the chunks; nothing has changed then.
        """
        self._require_active(sequence)
        if num_tokens < 0:
            raise ValueError(f"cannot reserve {num_tokens} tokens")
        end = sequence.num_tokens + num_tokens
        needed = self._stored.num_chunks_for(end) - len(sequence.chunk_ids)
        if needed > 0:
            self._stored.require_available(needed)
            sequence.add_chunks(self._stored.allocate(needed))
        filled = self._windows.reserve(sequence, self.stored_tokens(sequence), end)
        added = needed > 0 or filled
        self.version += added
        return added

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
        num_computed = self.stored_tokens(sequence)
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
        while len(sequence.tail) >= self._stored.chunk_bytes and self._seal(sequence):
            sealed = True
        sequence.num_computed_tail_tokens = sequence.num_tail_tokens
        if sealed:
            self.version += 1
            self._rows = None
        self._windows.go_on_from(sequence, num_tokens)
        return sealed

    def fork(
        self, sequence: SequenceHandle, *, copy_tail: bool = True
    ) -> tuple[SequenceHandle, list[tuple[int, int]]]:
        """A second sequence with the same tokens; shares what is sealed and copies the tail.

        Without `copy_tail` only full chunks of the tail are copied: what is behind them counts as
        not computed.

        Returns it and the ``(source, destination)`` chunks that the caller must copy on the device
        before either is written again. A source may be what ``sequence.copy`` fills, so that one
        must have been carried out before this call. Room reserved by ``sequence`` is not carried
        over. Raises PoolExhausted when the pool cannot give the tail's chunks; nothing has changed
        then.
        """
        self._require_active(sequence)
        needed = self._stored.num_chunks_for(sequence.num_tail_tokens)
        self._stored.require_available(needed)
        self._require_window_room()
        destinations = self._stored.allocate(needed)
        for node in sequence.nodes:
            self._stored.take(node)
        sequence.root.references += 1
        copy = SequenceHandle(sequence.root, list(sequence.nodes), sequence.tail)
        copy.add_chunks(destinations)
        copy.num_tokens = sequence.num_tokens
        computed = sequence.num_computed_tail_tokens
        full = computed // self.chunk_size
        copy.num_computed_tail_tokens = computed if copy_tail else full * self.chunk_size
        copy.num_matched_tokens = len(copy.nodes) * self.chunk_size
        copy.num_cached_tokens = copy.num_matched_tokens + copy.num_computed_tail_tokens
        self._activate(copy)
        copied = needed if copy_tail else full
        sources = sequence.private_chunk_ids[:copied]
        copies = list(zip(sources, destinations[:copied], strict=True))
        begin, sealed = self.computed_tokens(sequence), len(copy.nodes) * self.chunk_size
        self._windows.enter(copy, min(begin, sealed))
        if begin > sealed:
            end = min(begin, sealed + copy.num_computed_tail_tokens)
            places = self._windows.places(sources)
            self._windows.copy(copy, sealed, end, list(zip(places, destinations, strict=False)))
        return copy, copies

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
        self._windows.leave(sequence)
        self._stored.allocator.free(sequence.private_chunk_ids)
        self._stored.leave(sequence.nodes, sequence.root, keep)

    # Cached chunks.

    def evict(self, count: int) -> int:
        """Frees up to ``count`` cached chunks, least recently used and leaves first.

        Returns how many. Chunks in use are never touched.
        """
        return self._stored.evict(count)

    def reset(self) -> int:
        """Forgets all that is stored.

        Frees every cached chunk and returns how many. Active sequences go on as they are, but
        nothing inserted later matches what they hold, and it is freed, not cached, when they leave.
        """
        self._stored.retire_roots()
        return self.evict(self.cached_count)

    def emptied(self) -> PrefixTree:
        """A new tree like this one with nothing in it, for a pool that has lost what it held."""
        self._stored.retire_roots()
        return self.resized(self.num_chunks, self.window_room)

    def resized(self, num_chunks: int, window_room: WindowRoom | None) -> PrefixTree:
        """A new tree with nothing in it, for a pool of another size."""
        return PrefixTree(
            num_chunks,
            self.chunk_size,
            retain=self.retain,
            window_room=window_room,
            observers=self._stored.observers,
        )

    def check(self) -> None:
        """Verifies every invariant; raises AssertionError naming the first one broken."""
        check_tree(self._stored, self._sequences.keys(), self.rows())

    # Inside.

    def _find_donor(
        self,
        root: Root | None,
        nodes: list[Node],
        encoded: bytes,
        like: SequenceHandle | None = None,
    ) -> tuple[int | None, int]:
        """The chunk that the one behind these can be copied from, and how many tokens of it."""
        node, num_tokens = self._stored.find_donor(root, nodes, encoded)
        donor = node.chunk_id if node is not None else None
        if like is not None and self.is_active(like):
            in_tail = self._stored.tokens_in_tail(like, root, nodes, encoded)
            if in_tail > num_tokens:
                donor, num_tokens = like.chunk_ids[len(nodes)], in_tail
        windows = self._windows
        if donor is None or not windows.has(donor) or windows.usable(nodes) < len(nodes):
            return None, 0
        return donor, num_tokens

    def _require_window_room(self) -> None:
        if not self._windows.has_room():
            raise PoolExhausted("heads with windows have no chunks for one more sequence")

    def _require_active(self, sequence: SequenceHandle) -> None:
        if not self.is_active(sequence):
            raise ValueError("the sequence is not active in this tree (released before?)")

    def _activate(self, sequence: SequenceHandle) -> None:
        self._sequences[sequence] = None
        self._rows = None
        self.version += 1

    def _seal(self, sequence: SequenceHandle) -> bool:
        """Makes the first private chunk, full, a node; False if a pending node is in its place."""
        parent = sequence.nodes[-1] if sequence.nodes else sequence.root
        chunk = sequence.tail[: self._stored.chunk_bytes]
        position = len(sequence.nodes)
        own_chunk_id = sequence.chunk_ids[position]
        node = self._stored.child(parent, chunk)
        if node is None:
            node = self._stored.add(parent, chunk, own_chunk_id)
            self._stored.set_computed(node)
        elif node.computed:
            self._stored.take(node)
            self._windows.exchange(sequence, position, node.chunk_id)
            self._stored.allocator.free((own_chunk_id,))
            sequence.replace_chunk(position, node.chunk_id)
        else:
            return False
        sequence.nodes.append(node)
        sequence.path += node.chunk_id.to_bytes(4, "big")
        sequence.tail = sequence.tail[self._stored.chunk_bytes :]
        return True
