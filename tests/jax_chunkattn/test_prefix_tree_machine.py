"""The prefix tree driven at random against a model that stores whole prefixes in dicts and lists.

The model knows which chunk-long prefixes exist, finds eviction victims by scanning all of them, and
never uses chunk ids. Beside it stands a pool in which every token slot records the whole prefix it
was written for, so that a chunk with the wrong content, written twice or given to two owners shows
wherever it is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jax_chunkattn.allocator import PoolExhausted
from jax_chunkattn.prefix_tree import PrefixTree
from jax_chunkattn.tree_nodes import Node, SequenceHandle

CHUNK = 2
MIN_STEPS = 2_000
EVENTS = {
    "aborted",
    "append before computed refused",
    "append joined an existing chunk",
    "computed what another owed",
    "evicted",
    "fork refused",
    "full tail waits for a pending twin",
    "insert evicted",
    "insert hit cached",
    "insert refused",
    "insert refused because of what it matched",
    "reserve refused",
    "reset with sequences active",
}
Namespace = tuple[int, bytes]  # how many resets came before, and the salt
Prefix = tuple[Namespace, tuple[int, ...]]

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
PROMPTS = st.builds(
    lambda prefix, suffix: prefix + suffix,
    st.sampled_from([[], [0, 0], [0, 0, 1, 1], [0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1]]),
    TOKENS,
)
SALTS = st.sampled_from([b"", b"other"])


def num_chunks_for(num_tokens: int) -> int:
    return -(-num_tokens // CHUNK)


@dataclass(eq=False)
class ModelSequence:
    namespace: Namespace
    tokens: list[int]
    num_sealed: int  # chunks
    num_chunks: int  # sealed, tail and reserved
    tail_computed: int = 0

    def prefix(self, num_chunks: int) -> Prefix:
        return self.namespace, tuple(self.tokens[: num_chunks * CHUNK])

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
            return min(len(tokens) for _, tokens in pending) - CHUNK
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


class PrefixTreeMachine(RuleBasedStateMachine):
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()
    handles = Bundle("handles")

    @initialize(
        num_chunks=st.sampled_from([12, 5, 8, 20]), retain=st.sampled_from([True] * 4 + [False])
    )
    def start(self, num_chunks: int, retain: bool) -> None:
        self.tree = PrefixTree(num_chunks, CHUNK, retain=retain)
        self.model = ModelTree(num_chunks, retain)
        self.pairs: dict[SequenceHandle, ModelSequence] = {}
        self.pool: list[list[Prefix | None]] = [[None] * CHUNK for _ in range(num_chunks)]

    def saw(self, event: str) -> None:
        self.seen[event] += 1

    def write(self, handle: SequenceHandle, begin: int, end: int) -> None:
        """What the device does: one slot per token, in the chunks the handle names."""
        sequence = self.pairs[handle]
        for position in range(begin, end):
            content = (sequence.namespace, tuple(sequence.tokens[: position + 1]))
            self.pool[handle.chunk_ids[position // CHUNK]][position % CHUNK] = content

    @rule(target=handles, tokens=PROMPTS, salt=SALTS)
    def insert(self, tokens: list[int], salt: bytes):
        model = self.model
        namespace = (model.resets, salt)
        matched = model.match(namespace, tokens)
        needed = num_chunks_for(len(tokens)) - matched
        sequence = ModelSequence(
            namespace, list(tokens), len(tokens) // CHUNK, num_chunks_for(len(tokens))
        )
        kept = set(sequence.sealed_prefixes()[:matched])
        if not model.can_get(needed, kept):
            self.saw("insert refused")
            if kept & model.cached():
                self.saw("insert refused because of what it matched")
            version = self.tree.version
            with pytest.raises(PoolExhausted):
                self.tree.insert(tokens, salt)
            assert self.tree.version == version
            return multiple()
        if model.evict(needed - model.free_count(), kept):
            self.saw("insert evicted")
        if kept & model.cached():
            self.saw("insert hit cached")
        model.add(sequence)
        handle = self.tree.insert(tokens, salt)
        assert handle.num_cached_tokens == matched * CHUNK
        self.pairs[handle] = sequence
        return handle

    @rule(target=handles, tokens=PROMPTS, salt=SALTS, excess=st.sampled_from([0, 1]))
    def insert_to_the_brim(self, tokens: list[int], salt: bytes, excess: int):
        """A prompt that takes all that can be had, or one chunk more."""
        for _ in range(self.tree.num_chunks):
            namespace = (self.model.resets, salt)
            matched = self.model.match(namespace, tokens)
            kept = {(namespace, tuple(tokens[: count * CHUNK])) for count in range(1, matched + 1)}
            needed = num_chunks_for(len(tokens)) - matched - excess
            if needed >= 0 and not self.model.can_get(needed + 1, kept):
                break
            tokens = [*tokens, 1, 1]
        return self.insert(tokens, salt)

    @rule(target=handles, handle=handles, tokens=TOKENS)
    def next_turn(self, handle: SequenceHandle, tokens: list[int]):
        """A prompt that continues another sequence, which may still be growing."""
        return self.insert(self.pairs[handle].tokens + tokens, handle.salt)

    @rule(handle=handles, data=st.data())
    def compute(self, handle: SequenceHandle, data: st.DataObject) -> None:
        begin = self.tree.computed_tokens(handle)
        self.compute_until(handle, data.draw(st.integers(begin, handle.num_tokens)))

    @rule(handle=handles)
    def compute_all(self, handle: SequenceHandle) -> None:
        self.compute_until(handle, handle.num_tokens)

    def compute_until(self, handle: SequenceHandle, end: int) -> None:
        begin = self.tree.computed_tokens(handle)
        if begin < min(end, handle.num_cached_tokens):
            self.saw("computed what another owed")
        self.write(handle, begin, end)
        self.tree.mark_computed(handle, end)
        self.model.mark(self.pairs[handle], end)

    @rule(handle=handles, num_tokens=st.integers(0, 5))
    def reserve(self, handle: SequenceHandle, num_tokens: int) -> None:
        sequence = self.pairs[handle]
        total = num_chunks_for(len(sequence.tokens) + num_tokens)
        needed = max(total - sequence.num_chunks, 0)
        if not self.model.can_get(needed, set()):
            self.saw("reserve refused")
            with pytest.raises(PoolExhausted):
                self.tree.reserve(handle, num_tokens)
            return
        self.model.evict(needed - self.model.free_count())
        sequence.num_chunks += needed
        assert self.tree.reserve(handle, num_tokens) == (needed > 0)

    @rule(handle=handles, tokens=TOKENS)
    def append(self, handle: SequenceHandle, tokens: list[int]) -> None:
        sequence = self.pairs[handle]
        room = sequence.num_chunks * CHUNK - len(sequence.tokens)
        if self.model.num_computed(sequence) < len(sequence.tokens):
            self.saw("append before computed refused")
            with pytest.raises(ValueError, match="mark_computed"):
                self.tree.append(handle, tokens)
            return
        if room == 0:
            with pytest.raises(ValueError, match="reserve"):
                self.tree.append(handle, tokens)
            return
        tokens, begin = tokens[:room], len(sequence.tokens)
        chunk_ids = list(handle.chunk_ids)
        changed = self.model.append(sequence, tokens)
        self.write(handle, begin, begin + len(tokens))
        version = self.tree.version
        assert self.tree.append(handle, tokens) == changed
        assert (self.tree.version != version) == changed
        if handle.chunk_ids != chunk_ids:
            self.saw("append joined an existing chunk")
        if handle.num_tail_tokens >= CHUNK:
            self.saw("full tail waits for a pending twin")

    @rule(handle=handles, tokens=TOKENS)
    def decode(self, handle: SequenceHandle, tokens: list[int]) -> None:
        """What a session does again and again."""
        self.compute_all(handle)
        self.reserve(handle, len(tokens))
        self.append(handle, tokens)

    @rule(handle=handles, count=st.integers(1, 4))
    def decode_what_another_holds(self, handle: SequenceHandle, count: int) -> None:
        sequence = self.pairs[handle]
        length = len(sequence.tokens)
        for other in self.model.sequences:
            same = (
                other.namespace == sequence.namespace and other.tokens[:length] == sequence.tokens
            )
            if same and len(other.tokens) > length:
                self.decode(handle, other.tokens[length : length + count])
                return

    @rule(target=handles, handle=handles)
    def fork(self, handle: SequenceHandle):
        sequence = self.pairs[handle]
        needed = num_chunks_for(len(sequence.tokens) - sequence.num_sealed * CHUNK)
        if not self.model.can_get(needed, set()):
            self.saw("fork refused")
            with pytest.raises(PoolExhausted):
                self.tree.fork(handle)
            return multiple()
        self.model.evict(needed - self.model.free_count())
        copy, copies = self.tree.fork(handle)
        assert len(copies) == needed
        for source, destination in copies:
            self.pool[destination] = list(self.pool[source])
        self.pairs[copy] = ModelSequence(
            sequence.namespace,
            list(sequence.tokens),
            sequence.num_sealed,
            sequence.num_sealed + needed,
            sequence.tail_computed,
        )
        self.model.add(self.pairs[copy])
        return copy

    @rule(handle=consumes(handles))
    def release(self, handle: SequenceHandle) -> None:
        if self.tree.computed_tokens(handle) < handle.num_tokens:
            self.saw("aborted")
        self.model.release(self.pairs.pop(handle))
        self.tree.release(handle)
        with pytest.raises(ValueError, match="not active"):
            self.tree.release(handle)

    @rule(handle=consumes(handles))
    def finish(self, handle: SequenceHandle) -> None:
        self.compute_all(handle)
        self.release(handle)

    @rule(count=st.integers(0, 4))
    def evict(self, count: int) -> None:
        expected = self.model.evict(count)
        if expected:
            self.saw("evicted")
        assert self.tree.evict(count) == expected

    @precondition(lambda self: self.tree.num_nodes > 3)
    @rule(sometimes=st.integers(0, 3))
    def reset(self, sometimes: int) -> None:
        if sometimes:
            return
        self.saw("reset with sequences active" if self.pairs else "reset")
        cached = self.model.cached()
        for prefix in cached:
            del self.model.computed[prefix]
        self.model.resets += 1
        assert self.tree.reset() == len(cached)

    @rule(tokens=PROMPTS, salt=SALTS)
    def match(self, tokens: list[int], salt: bytes) -> None:
        namespace = (self.model.resets, salt)
        match = self.tree.match(tokens, salt)
        assert len(match.chunk_ids) == self.model.match(namespace, tokens)
        assert match.num_tokens == len(match.chunk_ids) * CHUNK
        for position in range(match.num_computed_tokens):
            slot = self.pool[match.chunk_ids[position // CHUNK]][position % CHUNK]
            assert slot == (namespace, tuple(tokens[: position + 1]))

    @invariant()
    def everything_holds(self) -> None:
        type(self).steps += 1
        self.tree.check()
        self.sizes_are_the_models()
        self.nodes_are_the_models()
        self.sequences_are_the_models()
        self.rows_are_contiguous()

    def sizes_are_the_models(self) -> None:
        tree, model = self.tree, self.model
        assert tree.free_count == model.free_count()
        assert tree.cached_count == len(model.cached())
        assert tree.free_count + tree.cached_count + tree.in_use_count == tree.num_chunks

    def nodes_are_the_models(self) -> None:
        """The same prefixes are stored, computed or pending alike, with the right content."""
        stored = {}
        for node in self.tree._nodes.values():
            namespace, tokens = self.prefix_of(node)
            stored[namespace, tokens] = node.computed
            if node.computed:
                expected = [(namespace, tokens[:-1]), (namespace, tokens)]
                assert self.pool[node.chunk_id] == expected
        assert stored == self.model.computed

    def prefix_of(self, node: Node) -> Prefix:
        """What a node stands for; a sequence on it tells which reset it came after."""
        parts, place = [], node
        while isinstance(place, Node):
            parts.append(place.key[8:])
            place = place.parent
        tokens = tuple(memoryview(b"".join(reversed(parts))).cast("i"))
        assert place is not None
        resets = self.model.resets
        if place.retired:
            (resets,) = {s.namespace[0] for handle, s in self.pairs.items() if handle.root is place}
        return (resets, place.salt), tokens

    def sequences_are_the_models(self) -> None:
        for handle, sequence in self.pairs.items():
            assert handle.num_tokens == len(sequence.tokens)
            assert len(handle.chunk_ids) == sequence.num_chunks
            computed = self.tree.computed_tokens(handle)
            assert computed == self.model.num_computed(sequence)
            for position in range(computed):
                slot = self.pool[handle.chunk_ids[position // CHUNK]][position % CHUNK]
                assert slot == (sequence.namespace, tuple(sequence.tokens[: position + 1]))

    def rows_are_contiguous(self) -> None:
        rows = self.tree.rows()
        assert set(rows) == set(self.pairs)
        for chunk_id in range(self.tree.num_chunks):
            covered = [index for index, row in enumerate(rows) if chunk_id in row.chunk_ids]
            assert not covered or covered[-1] - covered[0] == len(covered) - 1


def test_random_operations_agree_with_the_model():
    PrefixTreeMachine.steps = 0
    PrefixTreeMachine.seen.clear()
    run_state_machine_as_test(
        PrefixTreeMachine,
        settings=settings(
            max_examples=500,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
    assert PrefixTreeMachine.steps >= MIN_STEPS
    missed = EVENTS - set(PrefixTreeMachine.seen)
    assert not missed, f"never happened in {PrefixTreeMachine.steps} steps: {missed}"
