"""A prefix tree that stores whole prefixes in dicts and lists, to hold the real one against.

It knows which chunk-long prefixes exist, finds eviction victims and donors by scanning all of them,
and never uses chunk ids.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from itertools import takewhile

CHUNK = 3
Namespace = tuple[int, bytes]  # how many resets came before, and the salt
Prefix = tuple[Namespace, tuple[int, ...]]


def num_chunks_for(num_tokens: int) -> int:
    return -(-num_tokens // CHUNK)


@dataclass(eq=False)
class ModelSequence:
    namespace: Namespace
    tokens: list[int]
    num_sealed: int  # chunks
    num_chunks: int  # sealed, tail and reserved
    tail_computed: int = 0
    num_copied: int = 0  # tokens copied by insert, which belong behind the first num_matched
    num_matched: int = 0

    def prefix(self, num_chunks: int) -> Prefix:
        return self.namespace, tuple(self.tokens[: num_chunks * CHUNK])

    def beginnings(self, num_tokens: int) -> list[Prefix]:
        """What the pool should hold for each of the first tokens: the prefix that ends there."""
        return [(self.namespace, tuple(self.tokens[: index + 1])) for index in range(num_tokens)]

    def sealed_prefixes(self) -> list[Prefix]:
        return [self.prefix(count) for count in range(1, self.num_sealed + 1)]


class ModelTree:
    """What the tree should do, said without any cleverness."""

    def __init__(self, num_chunks: int, retain: bool):
        self.num_chunks = num_chunks
        self.retain = retain
        self.resets = 0
        self.clock = 0
        self.computed: dict[Prefix, bool] = {}
        self.last_used: dict[Prefix, int] = {}
        self.sequences: list[ModelSequence] = []

    def used(self) -> set[Prefix]:
        return {prefix for sequence in self.sequences for prefix in sequence.sealed_prefixes()}

    def cached(self) -> set[Prefix]:
        return set(self.computed) - self.used()

    def free_count(self) -> int:
        private = sum(sequence.num_chunks - sequence.num_sealed for sequence in self.sequences)
        return self.num_chunks - len(self.computed) - private

    def match(self, namespace: Namespace, tokens: list[int]) -> int:
        count = 0
        while (count + 1) * CHUNK <= len(tokens):
            if (namespace, tuple(tokens[: (count + 1) * CHUNK])) not in self.computed:
                break
            count += 1
        return count

    def copyable(self, namespace: Namespace, tokens: list[int]) -> int:
        """How many tokens behind the matching chunks some computed chunk begins with too."""
        begin = self.match(namespace, tokens) * CHUNK
        shared = [
            sum(1 for _ in takewhile(bool, map(int.__eq__, tokens, stored)))
            for (other, stored), computed in self.computed.items()
            if computed and other == namespace and len(stored) == begin + CHUNK
        ]
        return max(begin, *shared, 0) - begin

    def can_get(self, needed: int, keeping: set[Prefix]) -> bool:
        return needed <= self.free_count() + len(self.cached() - keeping)

    def evict(self, count: int, keeping: Set[Prefix] = frozenset()) -> int:
        for evicted in range(max(count, 0)):
            parents = {(namespace, tokens[:-CHUNK]) for namespace, tokens in self.computed}
            leaves = self.cached() - parents - keeping
            if not leaves:
                return evicted
            del self.computed[min(leaves, key=lambda leaf: self.last_used[leaf])]
        return max(count, 0)

    def add(self, sequence: ModelSequence) -> None:
        for prefix in sequence.sealed_prefixes():
            self.computed.setdefault(prefix, False)
        self.sequences.append(sequence)

    def num_computed(self, sequence: ModelSequence) -> int:
        pending = [p for p in sequence.sealed_prefixes() if not self.computed[p]]
        if pending:
            begin = min(len(tokens) for _, tokens in pending) - CHUNK
            return begin + (sequence.num_copied if begin == sequence.num_matched else 0)
        return sequence.num_sealed * CHUNK + sequence.tail_computed

    def mark(self, sequence: ModelSequence, num_tokens: int) -> None:
        for prefix in sequence.sealed_prefixes():
            if len(prefix[1]) <= num_tokens:
                self.computed[prefix] = True
        in_tail = num_tokens - sequence.num_sealed * CHUNK
        sequence.tail_computed = max(sequence.tail_computed, in_tail)

    def append(self, sequence: ModelSequence, tokens: list[int]) -> bool:
        sequence.tokens += tokens
        before = sequence.num_sealed
        while (sequence.num_sealed + 1) * CHUNK <= len(sequence.tokens):
            prefix = sequence.prefix(sequence.num_sealed + 1)
            if not self.computed.setdefault(prefix, True):
                break
            sequence.num_sealed += 1
        sequence.tail_computed = len(sequence.tokens) - sequence.num_sealed * CHUNK
        return sequence.num_sealed > before

    def release(self, sequence: ModelSequence) -> None:
        self.sequences.remove(sequence)
        self.clock += 1
        used = self.used()
        for prefix in sequence.sealed_prefixes():
            if prefix in used:
                continue
            self.last_used[prefix] = self.clock
            current = sequence.namespace[0] == self.resets
            if not (self.retain and current and self.computed[prefix]):
                del self.computed[prefix]
