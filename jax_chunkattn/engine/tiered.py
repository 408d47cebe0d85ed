"""Tiers behind the pool: what leaves it is kept there, and comes back.

A chunk that is evicted is copied to the host before anything is written in its place, and with a
disk every chunk is, when it is computed. A prompt that would begin with such chunks has them
brought into the pool, while others are computed; until they are there it waits, and so does whoever
shares them.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jax_chunkattn.device.cache_config import CacheConfig, parse_bytes
from jax_chunkattn.device.chunk_arrays import ChunkArrays
from jax_chunkattn.device.chunk_transfers import in_calls
from jax_chunkattn.device.device import Device
from jax_chunkattn.engine.residency import Residency, TierError, TierStats
from jax_chunkattn.tiers.disk import HEADER, DiskTier
from jax_chunkattn.tiers.host import HostTier
from jax_chunkattn.tiers.names import chunk_name, namespace_of, root_name
from jax_chunkattn.tiers.store import ChunkStore, Tier
from jax_chunkattn.tree.kv_events import ChunkObserver
from jax_chunkattn.tree.nodes import Node, Root, SequenceHandle, num_computed
from jax_chunkattn.tree.prefix_tree import PrefixTree

LEAVING_AT_ONCE = 64
"""Chunks that are read together: there are two of each on the device until they have left."""
NEW_PART = 0.2
"""Of what a chunk takes: how much the last ones count beside all before them."""
TRIED_AGAIN = 16
"""One in so many prompts has chunks brought back though computing them seems faster."""
WAIT_SECONDS = 0.1
"""How long a turn waits for chunks when there is nothing else to do, or when too many leave."""


def open_residency(
    cache: CacheConfig,
    device: Device,
    *,
    caches: bool,
    seconds_per_token: Callable[[], float],
) -> Residency:
    """What a cache's config asks for behind the pool on this device.

    Args:
      caches: whether what requests leave is kept in the pool, and found by others.
      seconds_per_token: of computing a prompt.

    Raises:
      TierError: for tiers that cannot be there, or have no room for a chunk.
      OSError: when the folder cannot be had.
    """
    if not cache.has_tiers:
        return Residency()
    if not caches:
        raise TierError("host_memory and disk need sharing and retain: else nothing is cached")
    size = device.chunk_layout.chunk_bytes
    if cache.disk is not None and not device.model_is_told:
        raise TierError(
            "a disk needs a model that can be told from others: what it is made of has objects or "
            "functions that do not say what is in them; give these a __repr__, or make them "
            "dataclasses"
        )
    host = 0 if cache.host_memory is None else parse_bytes(cache.host_memory)
    limit = 0 if cache.disk_memory is None else parse_bytes(cache.disk_memory)
    for name, given, memory in (
        ("host_memory", cache.host_memory, host),
        ("disk_memory", cache.disk_memory, limit - HEADER.size),
    ):
        if given is not None and memory < size:
            raise TierError(f"a chunk takes {size:,} bytes, {name} is {given}")

    def open_disk(namespace: bytes) -> DiskTier | None:
        if cache.disk is None:
            return None
        return DiskTier(Path(cache.disk).expanduser().absolute(), namespace, size, limit)

    return Tiered(
        device,
        HostTier(host // size),
        open_disk,
        lambda: namespace_of(device.namespace_parts()),
        chunk_size=cache.chunk_size,
        seconds_per_token=seconds_per_token,
        always=cache.load == "always",
    )


@dataclass(frozen=True)
class _Load:
    """Chunks on their way into the pool, each behind the one before."""

    nodes: Sequence[Node]
    arrays: Future[ChunkArrays]


class Tiered(Residency):
    """Moves chunks between one engine's pool and the tiers behind it; observes the engine's trees.

    Args:
      namespace: of the model that is served now, and its cache.
      open_disk: the disk's tier of a namespace, if there is to be one.
      seconds_per_token: what computing a prompt's token takes, 0 before that is known.
      always: chunks are brought back though computing them may take less time.
    """

    moves = True

    def __init__(
        self,
        device: Device,
        host: HostTier,
        open_disk: Callable[[bytes], DiskTier | None],
        namespace: Callable[[], bytes],
        *,
        chunk_size: int,
        seconds_per_token: Callable[[], float],
        always: bool,
    ):
        self._device = device
        self._layout = device.chunk_layout
        self._open_disk = open_disk
        self._find_namespace = namespace
        self._namespace = namespace()
        self._store = ChunkStore(self._layout.chunk_bytes, host, open_disk(self._namespace))
        self._chunk_size = chunk_size
        self._seconds_per_token = seconds_per_token
        self._always = always
        self._names: dict[int, tuple[bytes, Node]] = {}  # of computed nodes, by chunk id
        self._leaving: dict[bytes, tuple[int, bool]] = {}  # chunk, and whether it was evicted
        self._keeping: deque[tuple[int, Future[None]]] = deque()  # so many chunks that were read
        self._coming: dict[Node, bytes] = {}
        self._loads: deque[_Load] = deque()
        self._seconds: dict[Tier, float] = {}  # of a chunk, as far as known
        self._computed_in_a_row = 0
        self._loaded: Counter[Tier] = Counter()
        self._computed_instead = 0
        device.before_writes = self.save

    @property
    def observers(self) -> Sequence[ChunkObserver]:
        return (self,)

    @property
    def stats(self) -> TierStats:
        moved, sizes, size = self._store.moved, self._store.sizes, self._chunk_size
        return TierStats(
            sizes[Tier.HOST],
            sizes[Tier.DISK],
            moved.kept[Tier.HOST],
            moved.kept[Tier.DISK],
            self._loaded[Tier.HOST] * size,
            self._loaded[Tier.DISK] * size,
            self._computed_instead * size,
            moved.dropped,
            dict(moved.failures),
            {tier.value: self._seconds.get(tier, 0.0) for tier in Tier},
            self._seconds_per_token() * size,
        )

    # What the tree tells.

    def stored(self, node: Node) -> None:
        above = self._name_above(node)
        if above is None:
            return
        name = chunk_name(above, node.key[8:])
        self._names[node.chunk_id] = name, node
        if self._store.has_disk:
            self._let_go(name, node.chunk_id, evicted=False)

    def evicting(self, node: Node) -> None:
        name = self._name_of(node)
        if name is not None:
            self._let_go(name, node.chunk_id, evicted=True)

    def removed(self, node: Node) -> None:
        name = self._name_of(node)
        if name is None:
            return
        del self._names[node.chunk_id]
        if not self._leaving.get(name, (0, True))[1]:  # whatever it was, nobody shall find it
            del self._leaving[name]
            self._store.give_up([name])

    def cleared(self) -> None:
        self._names.clear()
        self._coming = dict.fromkeys(self._coming, b"")  # awaited, and no beginning of a name

    def _name_of(self, node: Node) -> bytes | None:
        """Of a computed node; None where it is not found any longer."""
        name, known = self._names.get(node.chunk_id, (None, None))
        return name if known is node else None

    def _name_above(self, node: Node) -> bytes | None:
        """Of what stands before a node; None where that is not found any longer."""
        parent = node.parent
        if isinstance(parent, Root):
            return None if parent.retired else root_name(self._namespace, parent.salt)
        assert parent is not None
        if parent in self._coming:
            return self._coming[parent] or None
        return self._name_of(parent)

    # Out of the pool.

    def _let_go(self, name: bytes, chunk: int, *, evicted: bool) -> None:
        if name in self._leaving:
            self._leaving[name] = chunk, evicted or self._leaving[name][1]
        elif self._store.lacks(name, evicted=evicted):
            self._store.announce([name])
            self._leaving[name] = chunk, evicted

    def save(self) -> None:
        leaving = list(self._leaving.items())
        self._leaving.clear()
        for part in in_calls(len(leaving)):
            some = leaving[part]
            if not self._may_read_more():
                self._store.give_up([name for name, _ in some], "keep: too slow")
                continue
            try:
                read = self._device.read_chunks([chunk for _, (chunk, _) in some])
            except BaseException:
                names = [name for name, _ in leaving[part.start :]]
                self._store.give_up(names, "not read")
                raise
            evicted = {name: evicted for name, (_, evicted) in some}
            keep = self._store.later(lambda read=read, evicted=evicted: self._keep(read, evicted))
            self._keeping.append((len(some), keep))

    def _may_read_more(self) -> bool:
        """Whether what was read has left the device, but for what there is room for beside the
        pool; it is waited for a little."""
        keeping = self._keeping
        while keeping and keeping[0][1].done():
            keeping.popleft()
        if sum(size for size, _ in keeping) < LEAVING_AT_ONCE:
            return True
        return bool(wait([keeping[0][1]], WAIT_SECONDS).done)

    def leave(self, tree: PrefixTree) -> None:
        # Those last that others are found behind: where there is no room for all, they stay.
        for number, node in enumerate(reversed(tree.nodes()), 1):
            self.evicting(node)
            if number % LEAVING_AT_ONCE == 0:
                self._save_now()
        self._save_now()

    def _save_now(self) -> None:
        self.save()
        self._store.later(lambda: None).result()

    def _keep(self, read: ChunkArrays, evicted: dict[bytes, bool]) -> None:
        left = list(evicted)
        try:
            for index, (name, was_evicted) in enumerate(evicted.items()):
                chunk = self._layout.pack(read, index)
                self._store.put(name, chunk, evicted=was_evicted)
                left.remove(name)
        except Exception as error:  # of the device, or for want of memory: the chunks are lost
            self._store.give_up(left, f"keep: {type(error).__name__}")

    # Into the pool.

    def is_coming(self, node: Node) -> bool:
        return node in self._coming

    def fetch(self, sequence: SequenceHandle) -> Mapping[Tier, int]:
        nodes = sequence.nodes
        first = num_computed(nodes)
        while first < len(nodes) and nodes[first] in self._coming:
            first += 1
        found: list[tuple[Node, bytes, Tier]] = []
        above = self._name_above(nodes[first]) if first < len(nodes) else None
        for node in nodes[first:]:
            if above is None or node.references > 1:  # another computes it
                break
            name = chunk_name(above, node.key[8:])
            tier = self._store.find(name)
            if tier is None:
                break
            found.append((node, name, tier))
            above = name
        known = [name for name in map(self._name_of, nodes[:first]) if name is not None]
        self._store.use([*known, *(name for _, name, _ in found)])
        counts = Counter(tier for _, _, tier in found)
        if found and not self._pays(counts):
            self._computed_instead += len(found)
            return {}
        if any(name in self._leaving for _, name, _ in found):
            self.save()  # or they would be asked for before they have come
        for part in in_calls(len(found)):
            some = found[part]
            self._coming.update((node, name) for node, name, _ in some)
            names = [name for _, name, _ in some]
            load = self._store.later(lambda names=names: self._read(names))
            self._loads.append(_Load([node for node, _, _ in some], load))
        return dict(counts)

    def _pays(self, counts: Counter[Tier]) -> bool:
        """Whether to bring back so many takes less time than to compute them. Now and then it is
        tried though it does not: what was slow once need not be for ever."""
        compute = self._seconds_per_token() * self._chunk_size
        if self._always or not compute or not counts.keys() <= self._seconds.keys():
            return True
        load = sum(count * self._seconds[tier] for tier, count in counts.items())
        faster = load < compute * counts.total()
        self._computed_in_a_row = 0 if faster else self._computed_in_a_row + 1
        return faster or self._computed_in_a_row % TRIED_AGAIN == 0

    def _read(self, names: Sequence[bytes]) -> ChunkArrays:
        began = time.perf_counter()
        chunks, tiers = zip(*map(self._store.get, names), strict=True)
        arrays = self._layout.unpack(chunks)
        slowest = Tier.DISK if Tier.DISK in tiers else Tier.HOST
        took = (time.perf_counter() - began) / len(names)
        before = self._seconds.get(slowest, took)
        self._seconds[slowest] = before + NEW_PART * (took - before)
        self._loaded.update(tiers)
        return arrays

    def collect(self, tree: PrefixTree) -> None:
        while self._loads and self._loads[0].arrays.done():
            load = self._loads[0]
            awaited = tree.awaiting(load.nodes)
            if awaited and load.arrays.exception() is None:
                nowhere = [tree.num_chunks] * (len(load.nodes) - len(awaited))
                chunks = [*(node.chunk_id for node in awaited), *nowhere]
                self._device.write_chunks(chunks, load.arrays.result())
            else:
                awaited = []
            for node in awaited:
                tree.mark_loaded(node)
            for node in load.nodes:
                del self._coming[node]
            self._loads.popleft()

    def wait(self) -> bool:
        if not self._loads:
            return False
        wait([self._loads[0].arrays], WAIT_SECONDS)
        return True

    # The end, and new beginnings.

    def start_over(self) -> None:
        self._store.give_up(list(self._leaving))
        self._store.expect_no_more()
        self._leaving.clear()
        self._loads.clear()
        self._coming.clear()
        self._names.clear()

    def rename(self) -> None:
        self._store.rename(None)
        self._namespace = self._find_namespace()
        self._store.rename(partial(self._open_disk, self._namespace))

    def forget(self) -> None:
        self._store.give_up(list(self._leaving))
        self._leaving.clear()
        self._store.forget()

    def close(self) -> None:
        with suppress(Exception):  # there may be no pool to read from any longer
            self.save()
        self._device.before_writes = None
        self.start_over()
        self._store.close()
