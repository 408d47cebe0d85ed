"""Which replica holds which prefixes, kept where requests are sent from.

To ask every replica costs a round trip to each for every request: 7 to 10 milliseconds for two Ray
actors. Here a prompt is looked up in microseconds, in what their KV events have told.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockStored, KVEvent


class PrefixMap:
    """Chunks by their hashes (`tree.kv_events.hash_chunks`), with the replicas that hold each.

    A replica is a number, and the holders of a chunk one integer with a bit for each. A chunk that
    a replica is *expected* to hold, since a request for it is on its way there, counts like one
    that it is known to hold, for as long as the request is there.

    The `max_chunks` chunks that were last looked up or told of are kept, of a path those nearest to
    the root. What is forgotten is found less: a map never decides what is served.
    """

    def __init__(self, max_chunks: int):
        """Raises ValueError when `max_chunks` is below 1."""
        if max_chunks < 1:
            raise ValueError(f"max_chunks must be at least 1, got {max_chunks}")
        self.max_chunks = max_chunks
        self.forgotten = 0  # chunks that had to make room
        self._known: OrderedDict[int, int] = OrderedDict()
        self._expected: dict[int, int] = {}
        self._on_their_way: Counter[tuple[int, int]] = Counter()  # requests, by replica and chunk

    def __len__(self) -> int:
        """Chunks that some replica is known to hold."""
        return len(self._known)

    def lookup(self, hashes: Sequence[int], replicas: int) -> np.ndarray:
        """How many of a prompt's first chunks each replica has: int64 [replicas]."""
        depths = np.zeros(replicas, np.int64)
        known, expected = self._known, self._expected
        holders, depth = -1, 0  # of all chunks so far
        for block_hash in hashes:
            here = known.get(block_hash, 0) | expected.get(block_hash, 0)
            still = holders & here
            if still != holders:
                if depth:
                    depths[_numbers(holders & ~here, replicas)] = depth
                holders = still
                if not holders:
                    break
            depth += 1
        if holders > 0:
            depths[_numbers(holders, replicas)] = depth
        for block_hash in reversed(hashes[:depth]):
            if block_hash in known:
                known.move_to_end(block_hash)
        return depths

    def expect(self, replica: int, hashes: Iterable[int]) -> None:
        """A request that will have these chunks computed is on its way to a replica."""
        bit = 1 << replica
        for block_hash in hashes:
            self._expected[block_hash] = self._expected.get(block_hash, 0) | bit
            self._on_their_way[replica, block_hash] += 1

    def arrived(self, replica: int, hashes: Iterable[int]) -> None:
        """A request that was expected is not on its way any longer, whatever became of it."""
        for block_hash in hashes:
            key = replica, block_hash
            self._on_their_way[key] -= 1
            if not self._on_their_way[key]:
                del self._on_their_way[key]
                left = self._expected[block_hash] & ~(1 << replica)
                if left:
                    self._expected[block_hash] = left
                else:
                    del self._expected[block_hash]

    def hold(self, replica: int, hashes: Sequence[int]) -> None:
        """A replica holds these chunks of one prompt."""
        known, bit = self._known, 1 << replica
        for block_hash in reversed(hashes):
            known[block_hash] = known.get(block_hash, 0) | bit
            known.move_to_end(block_hash)
        while len(known) > self.max_chunks:
            known.popitem(last=False)
            self.forgotten += 1

    def drop(self, replica: int, hashes: Iterable[int]) -> None:
        """A replica holds these no longer."""
        known, others = self._known, ~(1 << replica)
        for block_hash in hashes:
            left = known.get(block_hash, 0) & others
            if left:
                known[block_hash] = left
            else:
                known.pop(block_hash, None)

    def clear(self, replica: int) -> None:
        """A replica holds nothing any longer; costs a pass over the whole map."""
        bit = 1 << replica
        self.drop(replica, [one for one, holders in self._known.items() if holders & bit])

    def apply(self, replica: int, events: Iterable[KVEvent]) -> None:
        """Takes over what a replica's cache has gained and lost."""
        for event in events:
            if isinstance(event, BlockStored):
                self.hold(replica, event.block_hashes)
            elif isinstance(event, AllBlocksCleared):
                self.clear(replica)
            else:
                self.drop(replica, event.block_hashes)


def _numbers(bits: int, replicas: int) -> np.ndarray:
    """Which of the first bits are set."""
    data = bits.to_bytes(-(-replicas // 8), "little")
    return np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
