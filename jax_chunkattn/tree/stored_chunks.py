"""What a pool's chunks hold: sealed ones as nodes below a root for each salt, used or cached."""

from __future__ import annotations

from collections.abc import Sequence

from jax_chunkattn.tree.allocator import ChunkAllocator, PoolExhausted
from jax_chunkattn.tree.children import (
    children_of,
    closest_child,
    num_shared_tokens,
    remove_child,
    set_computed,
)
from jax_chunkattn.tree.eviction import RecencyList
from jax_chunkattn.tree.kv_events import ChunkObserver
from jax_chunkattn.tree.nodes import TOKEN_BYTES, Node, Root, SequenceHandle
from jax_chunkattn.tree.window_room import WindowRoom
from jax_chunkattn.tree.windowed_chunks import EveryChunk, WindowedChunks


class StoredChunks:
    """The nodes of a prefix tree, and the chunks that are free.

    A node is taken by the sequences whose paths go through it; one that nobody has taken is cached,
    until it is evicted: the least recently used first, leaves before what is above them.

    Attributes:
      chunk_size, chunk_bytes: of a chunk, in tokens and in bytes of `encode_tokens`.
      retain: whether computed nodes stay cached when nobody uses them any longer.
      allocator: of the pool's chunks.
      nodes: all of them, by the parent's chunk id followed by the chunk's tokens.
      cached: those in no sequence, in the order of eviction.
      roots: by salt.
      num_evicted: chunks evicted so far.
      windows: which of them heads with windows have.
      observers: are told which computed nodes there are.
    """

    def __init__(
        self,
        num_chunks: int,
        chunk_size: int,
        *,
        retain: bool,
        window_room: WindowRoom | None,
        observers: Sequence[ChunkObserver] = (),
    ):
        """Raises ValueError when `num_chunks` or `chunk_size` is below 1, or there is too little
        room for windows."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.num_chunks = num_chunks
        self.chunk_size = chunk_size
        self.chunk_bytes = chunk_size * TOKEN_BYTES
        self.retain = retain
        self.observers = tuple(observers)
        self.allocator = ChunkAllocator(num_chunks)
        self.nodes: dict[bytes, Node] = {}
        self.cached = RecencyList()
        self.roots: dict[bytes, Root] = {}
        self.num_evicted = 0
        self.windows = (
            EveryChunk()
            if window_room is None
            else WindowedChunks(num_chunks, chunk_size, window_room)
        )
        self._next_root_id = num_chunks

    @property
    def free_count(self) -> int:
        return self.allocator.free_count

    # Finding.

    def walk(self, root: Root | None, encoded: bytes) -> list[Node]:
        """The nodes that hold the longest prefix of these tokens, in whole chunks."""
        nodes: list[Node] = []
        if root is None:
            return nodes
        parent: Node | Root = root
        size = self.chunk_bytes
        for begin in range(0, len(encoded) - size + 1, size):
            key = parent.chunk_id.to_bytes(8, "little") + encoded[begin : begin + size]
            node = self.nodes.get(key)  # `child` would take twice as long
            if node is None:
                break
            nodes.append(node)
            parent = node
        return nodes

    def child(self, parent: Node | Root, chunk: bytes) -> Node | None:
        """The node of these tokens, a whole chunk of them, right below `parent`."""
        return self.nodes.get(_key(parent, chunk))

    def find_donor(
        self, root: Root | None, nodes: list[Node], encoded: bytes
    ) -> tuple[Node | None, int]:
        """The computed node that begins most like the chunk behind `nodes`; shared tokens."""
        parent = nodes[-1] if nodes else root
        if parent is None:
            return None, 0
        return closest_child(parent, self._behind(nodes, encoded))

    def tokens_in_tail(
        self, sequence: SequenceHandle, root: Root | None, nodes: list[Node], encoded: bytes
    ) -> int:
        """How many tokens behind `nodes` are computed, alike, in a sequence's own first chunk."""
        alike = sequence.root is root and len(sequence.nodes) == len(nodes)
        if not alike or (nodes and sequence.nodes[-1] is not nodes[-1]):
            return 0
        computed = sequence.tail[: sequence.num_computed_tail_tokens * TOKEN_BYTES]
        return num_shared_tokens(computed, self._behind(nodes, encoded))

    def _behind(self, nodes: list[Node], encoded: bytes) -> bytes:
        """What of a sequence fills the chunk behind these."""
        begin = len(nodes) * self.chunk_bytes
        return encoded[begin : begin + self.chunk_bytes]

    # Room.

    def num_evictable(self, keeping: list[Node]) -> int:
        """Chunks that may be evicted if `keeping` may not."""
        return len(self.cached) - sum(node.references == 0 for node in keeping)

    def num_chunks_for(self, num_tokens: int) -> int:
        """Chunks that `num_tokens` tokens take; PoolExhausted if the pool is smaller."""
        count = -(-num_tokens // self.chunk_size)
        if count > self.num_chunks:
            raise PoolExhausted(
                f"{num_tokens} tokens take {count} chunks of {self.chunk_size} and can never fit "
                f"in a pool of {self.num_chunks}"
            )
        return count

    def require_available(self, needed: int, keeping: list[Node] | None = None) -> None:
        """Raises PoolExhausted unless that many are free, or evictable and not in `keeping`."""
        evictable = self.num_evictable(keeping or [])
        if needed > self.free_count + evictable:
            raise PoolExhausted(
                f"{needed} more chunks of {self.chunk_size} tokens are needed; of the pool's "
                f"{self.num_chunks}, {self.free_count} are free and {evictable} can be evicted"
            )

    def allocate(self, count: int) -> list[int]:
        """Chunks that hold nothing; cached ones are evicted when too few are free."""
        self.evict(count - self.free_count)
        return self.allocator.allocate(count)

    def evict(self, count: int) -> int:
        """Frees up to `count` cached chunks; returns how many."""
        evicted = max(0, min(count, len(self.cached)))
        for _ in range(evicted):
            node = self.cached.oldest
            for observer in self.observers:
                observer.evicting(node)
            self.cached.remove(node)
            self._remove(node)
        self.num_evicted += evicted
        return evicted

    # Coming and going.

    def open_root(self, salt: bytes) -> Root:
        """The root of a salt, a new one if there is none."""
        root = self.roots.get(salt)
        if root is None:
            root = self.roots[salt] = Root(self._next_root_id, salt)
            self._next_root_id += 1
        return root

    def retire_roots(self) -> None:
        """Nothing below the roots there are is found any longer, or cached."""
        for observer in self.observers:
            observer.cleared()
        for root in self.roots.values():
            root.retired = True
        self.roots.clear()

    def add(self, parent: Node | Root, chunk: bytes, chunk_id: int) -> Node:
        """A pending node of these tokens, taken once."""
        node = Node(chunk_id, _key(parent, chunk), parent)
        node.references = 1
        self.nodes[node.key] = node
        if isinstance(parent, Root):
            parent.references += 1
        return node

    def set_computed(self, node: Node) -> None:
        """The keys and values of a pending node are there."""
        set_computed(node)
        for observer in self.observers:
            observer.stored(node)

    def take(self, node: Node) -> None:
        """One more sequence goes through a node."""
        if node.references == 0:
            self.cached.remove(node)
        node.references += 1

    def leave(self, nodes: list[Node], root: Root, keep: int | None = None) -> None:
        """A sequence that had taken a path leaves it, and its root.

        Computed nodes that nobody uses become cached, only the first `keep` of the path if that is
        given; others are removed, with what is cached below them.
        """
        if not self.retain or root.retired:
            keep = 0
        for index, node in reversed(list(enumerate(nodes))):
            node.references -= 1
            if node.references:
                continue
            if node.computed and (keep is None or index < keep):
                self.cached.push(node)
            else:
                self._evict_below(node)
                self._remove(node)
        self._drop_root_reference(root)

    def _evict_below(self, node: Node) -> None:
        """Frees what is cached below a node that nobody uses."""
        below = children_of(node)
        for descendant in below:
            below.extend(children_of(descendant))  # grows as it is walked
        for descendant in reversed(below):
            self.cached.remove(descendant)
            self._remove(descendant)

    def _remove(self, node: Node) -> None:
        del self.nodes[node.key]
        if node.computed:
            remove_child(node)
            for observer in self.observers:
                observer.removed(node)
        self.windows.forget(node.chunk_id)
        self.allocator.free((node.chunk_id,))
        if isinstance(node.parent, Root):
            self._drop_root_reference(node.parent)

    def _drop_root_reference(self, root: Root) -> None:
        root.references -= 1
        if root.references == 0 and not root.retired:
            del self.roots[root.salt]


def _key(parent: Node | Root, chunk: bytes) -> bytes:
    return parent.chunk_id.to_bytes(8, "little") + chunk
