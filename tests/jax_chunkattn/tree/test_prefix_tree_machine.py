"""The prefix tree driven at random against the model of `tree_model`.

Beside the model stands a pool in which every token slot records the whole prefix it was written
for, so that a chunk with the wrong content, written twice or given to two owners shows wherever it
is read. The copies that inserts ask for wait until something is to be written, and are then carried
out together.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockStored, KVEvents
from jax_chunkattn.tree.nodes import Node, PartialCopy, SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.jax_chunkattn.machines import run_until_seen
from tests.jax_chunkattn.tree.tree_helpers import SlotPool
from tests.jax_chunkattn.tree.tree_model import (
    CHUNK,
    ModelSequence,
    ModelTree,
    Prefix,
    num_chunks_for,
)

MIN_STEPS = 2_000
EVENTS = {
    "aborted",
    "append before computed refused",
    "append joined an existing chunk",
    "cleared",
    "computed what another owed",
    "copied a whole tail",
    "copied from a chunk to itself",
    "copied from a chunk that the insert evicted",
    "copied into a node",
    "copied into a tail",
    "copied what was handed out again",
    "copied within a sequence",
    "dropped a copy",
    "dropped a copy into a shared chunk",
    "evicted",
    "fork refused",
    "forked a sequence with a copy waiting",
    "full tail waits for a pending twin",
    "insert evicted",
    "insert hit cached",
    "insert refused",
    "insert refused because of what it matched",
    "reserve refused",
    "reset with copies waiting",
    "reset with sequences active",
    "several chunks in one event",
    "several copies at once",
}

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=7)
PROMPTS = st.builds(
    lambda prefix, suffix: prefix + suffix,
    st.sampled_from([[], [0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 0, 1, 1], [1] * 8]),
    TOKENS,
)
SALTS = st.sampled_from([b"", b"other"])
ACTIVE = st.runner().flatmap(lambda machine: st.sampled_from(list(machine.pairs)))
SEVERAL = st.lists(ACTIVE, min_size=1, max_size=3, unique=True)
with_sequences = precondition(lambda machine: bool(machine.pairs))


class PrefixTreeMachine(RuleBasedStateMachine):
    steps: ClassVar[int] = 0
    seen: ClassVar[Counter[str]] = Counter()

    @initialize(
        num_chunks=st.sampled_from([12, 5, 8, 20]),
        retain=st.sampled_from([True] * 4 + [False]),
        whole_chunks=st.booleans(),
        most_waiting=st.sampled_from([1000, 1]),
    )
    def start(self, num_chunks: int, retain: bool, whole_chunks: bool, most_waiting: int) -> None:
        self.whole_chunks = whole_chunks  # what a copy may bring besides its tokens
        self.events = KVEvents(most_waiting=most_waiting)
        self.told: dict[int, Prefix] = {}
        self.tree = PrefixTree(num_chunks, CHUNK, retain=retain, observers=[self.events])
        self.model = ModelTree(num_chunks, retain)
        self.pairs: dict[SequenceHandle, ModelSequence] = {}
        self.pool = SlotPool(num_chunks, CHUNK)
        self.waiting: dict[SequenceHandle, PartialCopy] = {}

    def saw(self, event: str) -> None:
        self.seen[event] += 1

    def write(self, handle: SequenceHandle, begin: int, end: int) -> None:
        """What the device does: one slot per token, in the chunks the handle names."""
        self.carry_out_copies()
        sequence = self.pairs[handle]
        self.pool.write(handle.chunk_ids, begin, sequence.beginnings(end)[begin:])

    @rule()
    def carry_out_copies(self) -> None:
        copies = list(self.waiting.values())
        sources = [copy.source_chunk for copy in copies]
        for index, copy in enumerate(copies):
            if copy.destination_chunk in sources[:index] + sources[index + 1 :]:
                self.saw("copied what was handed out again")
        if len(copies) > 1:
            self.saw("several copies at once")
        self.pool.copy(copies, whole_chunks=self.whole_chunks)
        self.waiting.clear()

    @rule(tokens=PROMPTS, salt=SALTS, copy_partial=st.booleans())
    def insert_any(self, tokens: list[int], salt: bytes, copy_partial: bool) -> None:
        self.insert(tokens, salt, copy_partial)

    def insert(self, tokens: list[int], salt: bytes, copy_partial: bool) -> SequenceHandle | None:
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
                self.tree.insert(tokens, salt, copy_partial=copy_partial)
            assert self.tree.version == version
            return None
        if copy_partial:
            sequence.num_copied = model.copyable(namespace, tokens)
            sequence.num_matched = matched * CHUNK
            if matched == sequence.num_sealed:
                sequence.tail_computed = sequence.num_copied
        if model.evict(needed - model.free_count(), kept):
            self.saw("insert evicted")
        if kept & model.cached():
            self.saw("insert hit cached")
        model.add(sequence)
        handle = self.tree.insert(tokens, salt, copy_partial=copy_partial)
        assert handle.num_cached_tokens == matched * CHUNK + sequence.num_copied
        self.pairs[handle] = sequence
        self.note_copy(handle, sequence)
        return handle

    def note_copy(self, handle: SequenceHandle, sequence: ModelSequence) -> None:
        copy = handle.copy
        assert (copy is not None) == (sequence.num_copied > 0)
        if copy is None:
            return
        assert copy.num_tokens == sequence.num_copied
        assert copy.destination_chunk == handle.chunk_ids[sequence.num_matched // CHUNK]
        self.waiting[handle] = copy
        into_tail = sequence.num_matched // CHUNK == sequence.num_sealed
        self.saw("copied into a tail" if into_tail else "copied into a node")
        if handle.num_cached_tokens == handle.num_tokens:
            self.saw("copied a whole tail")
        stored = {node.chunk_id for node in self.tree._stored.nodes.values() if node.computed}
        if copy.source_chunk not in stored:
            self.saw("copied from a chunk that the insert evicted")
        if copy.source_chunk == copy.destination_chunk:
            self.saw("copied from a chunk to itself")
        elif copy.source_chunk in handle.chunk_ids:
            self.saw("copied within a sequence")

    @rule(
        tokens=PROMPTS,
        salt=SALTS,
        excess=st.sampled_from([0, 0, 0, 1]),
        copy_partial=st.booleans(),
    )
    def insert_to_the_brim(
        self, tokens: list[int], salt: bytes, excess: int, copy_partial: bool
    ) -> None:
        """A prompt that takes all that can be had, or one chunk more."""
        self.make_room()
        for _ in range(self.tree.num_chunks):
            namespace = (self.model.resets, salt)
            matched = self.model.match(namespace, tokens)
            kept = {(namespace, tuple(tokens[: count * CHUNK])) for count in range(1, matched + 1)}
            needed = num_chunks_for(len(tokens)) - matched - excess
            if needed >= 0 and not self.model.can_get(needed + 1, kept):
                break
            tokens = [*tokens, *[1] * CHUNK]
        self.insert(tokens, salt, copy_partial)

    def make_room(self) -> None:
        """The oldest sequences leave until half of the pool can be had."""
        while self.tree.in_use_count > self.tree.num_chunks // 2:
            self.release(next(iter(self.pairs)))

    @with_sequences
    @rule(handle=ACTIVE, tokens=TOKENS, copy_partial=st.booleans())
    def next_turn(self, handle: SequenceHandle, tokens: list[int], copy_partial: bool) -> None:
        """A prompt that continues another sequence, which may still be growing."""
        self.insert(self.pairs[handle].tokens + tokens, handle.salt, copy_partial)

    @with_sequences
    @rule(handle=ACTIVE, kept=st.integers(0, 8), tokens=TOKENS, forked=st.booleans())
    def insert_beside(
        self, handle: SequenceHandle, kept: int, tokens: list[int], forked: bool
    ) -> None:
        """A prompt that begins like a sequence and leaves it, mostly inside a chunk."""
        beside = self.insert(self.pairs[handle].tokens[:kept] + tokens, handle.salt, True)
        if forked and beside is not None:
            self.fork(beside)

    @rule(
        shared=PROMPTS,
        suffixes=st.lists(TOKENS, min_size=2, max_size=4),
        salt=SALTS,
        then=st.sampled_from(["the donor leaves", "the first leaves", "reset"]),
    )
    def insert_together(
        self, shared: list[int], suffixes: list[list[int]], salt: bytes, then: str
    ) -> None:
        """Requests that arrive at once and begin alike, as one served before did; copies wait."""
        self.serve([[*shared, 0, 1, 0], *suffixes], salt)
        first = self.insert(shared + suffixes[0], salt, True)
        if then == "the donor leaves" and first in self.waiting:
            while self.waiting[first].source_chunk in {
                node.chunk_id for node in self.tree._stored.cached
            }:
                self.evict(1)
        for suffix in suffixes:
            self.insert(suffix[:2] + shared, salt, True)
            self.insert(shared + suffix, salt, True)
        if then == "the first leaves" and first is not None:
            self.release(first)
        if then == "reset":
            self.reset()

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=4), salt=SALTS)
    def serve(self, prompts: list[list[int]], salt: bytes) -> None:
        """Requests from their beginning to their end, which leave their chunks cached."""
        self.make_room()
        for tokens in prompts:
            handle = self.insert(tokens, salt, True)
            if handle is not None:
                self.finish([handle])

    @with_sequences
    @rule(several=SEVERAL, kept=st.integers(0, 8), tokens=TOKENS)
    def preempt(self, several: list[SequenceHandle], kept: int, tokens: list[int]) -> None:
        """Sequences give up their chunks for another one, which may be like them."""
        first = self.pairs[several[0]]
        self.abort(several)
        self.insert(first.tokens[:kept] + tokens, several[0].salt, True)

    @with_sequences
    @rule(handle=ACTIVE, data=st.data())
    def compute(self, handle: SequenceHandle, data: st.DataObject) -> None:
        begin = self.tree.computed_tokens(handle)
        self.compute_until(handle, data.draw(st.integers(begin, handle.num_tokens)))

    @with_sequences
    @rule(handle=ACTIVE)
    def compute_all(self, handle: SequenceHandle) -> None:
        self.compute_until(handle, handle.num_tokens)

    def compute_until(self, handle: SequenceHandle, end: int) -> None:
        begin = self.tree.computed_tokens(handle)
        if begin < min(end, handle.num_cached_tokens):
            self.saw("computed what another owed")
        assert begin >= handle.num_cached_tokens or handle.copy is None
        self.write(handle, begin, end)
        self.tree.mark_computed(handle, end)
        self.model.mark(self.pairs[handle], end)

    @with_sequences
    @rule(handle=ACTIVE, num_tokens=st.integers(0, 5))
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

    @with_sequences
    @rule(handle=ACTIVE, tokens=TOKENS)
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

    @with_sequences
    @rule(handle=ACTIVE, tokens=TOKENS)
    def decode(self, handle: SequenceHandle, tokens: list[int]) -> None:
        """What a session does again and again."""
        self.compute_all(handle)
        self.reserve(handle, len(tokens))
        self.append(handle, tokens)

    @with_sequences
    @rule(handle=ACTIVE, tokens=TOKENS, computed=st.booleans())
    def decode_what_another_holds(
        self, handle: SequenceHandle, tokens: list[int], computed: bool
    ) -> None:
        self.compute_all(handle)
        other = self.insert(self.pairs[handle].tokens + tokens, handle.salt, True)
        if computed and other is not None:
            self.finish([other])
        self.decode(handle, tokens)

    @with_sequences
    @rule(handle=ACTIVE)
    def fork(self, handle: SequenceHandle) -> None:
        if handle in self.waiting:
            self.saw("forked a sequence with a copy waiting")
        self.carry_out_copies()
        sequence = self.pairs[handle]
        needed = num_chunks_for(len(sequence.tokens) - sequence.num_sealed * CHUNK)
        if not self.model.can_get(needed, set()):
            self.saw("fork refused")
            with pytest.raises(PoolExhausted):
                self.tree.fork(handle)
            return
        self.model.evict(needed - self.model.free_count())
        copy, copies = self.tree.fork(handle)
        assert len(copies) == needed
        assert copy.copy is None
        self.pool.copy([PartialCopy(*pair, CHUNK) for pair in copies])
        self.pairs[copy] = ModelSequence(
            sequence.namespace,
            list(sequence.tokens),
            sequence.num_sealed,
            sequence.num_sealed + needed,
            sequence.tail_computed,
        )
        self.model.add(self.pairs[copy])

    @with_sequences
    @rule(several=SEVERAL)
    def abort(self, several: list[SequenceHandle]) -> None:
        for handle in several:
            self.release(handle)

    @with_sequences
    @rule(several=SEVERAL)
    def finish(self, several: list[SequenceHandle]) -> None:
        for handle in several:
            self.compute_all(handle)
            self.release(handle)

    def release(self, handle: SequenceHandle) -> None:
        if self.tree.computed_tokens(handle) < handle.num_tokens:
            self.saw("aborted")
        if handle in self.waiting:
            dropped = self.waiting.pop(handle)
            self.saw("dropped a copy")
            shared = [node.chunk_id for node in handle.nodes if node.references > 1]
            if dropped.destination_chunk in shared:
                self.saw("dropped a copy into a shared chunk")
        self.model.release(self.pairs.pop(handle))
        self.tree.release(handle)
        with pytest.raises(ValueError, match="not active"):
            self.tree.release(handle)

    @rule(count=st.integers(0, 4))
    def evict(self, count: int) -> None:
        expected = self.model.evict(count)
        if expected:
            self.saw("evicted")
        assert self.tree.evict(count) == expected

    @rule(sometimes=st.integers(0, 9))
    def reset_rarely(self, sometimes: int) -> None:
        if not sometimes:
            self.reset()

    def reset(self) -> None:
        self.saw("reset with sequences active" if self.pairs else "reset")
        if self.waiting:
            self.saw("reset with copies waiting")
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
        assert match.num_copyable_tokens == self.model.copyable(namespace, tokens)
        assert self.pool.read(match.chunk_ids, match.num_computed_tokens) == [
            (namespace, tuple(tokens[: position + 1]))
            for position in range(match.num_computed_tokens)
        ]

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
        for node in self.tree._stored.nodes.values():
            namespace, tokens = self.prefix_of(node)
            stored[namespace, tokens] = node.computed
            if node.computed:
                first = len(tokens) - CHUNK + 1
                expected = [(namespace, tokens[:end]) for end in range(first, len(tokens) + 1)]
                assert self.pool.read([node.chunk_id], CHUNK) == expected
        assert stored == self.model.computed

    @rule()
    def events_tell_what_can_be_found(self) -> None:
        for event in self.events.take():
            if isinstance(event, BlockStored):
                self.saw("several chunks in one event" if len(event.block_hashes) > 1 else "stored")
                above = self.told.get(event.parent_block_hash or 0, ((0, event.salt), ()))[1]
                for index, block_hash in enumerate(event.block_hashes, 1):
                    tokens = (*above, *event.token_ids[: index * CHUNK])
                    assert block_hash not in self.told
                    self.told[block_hash] = ((self.model.resets, event.salt), tokens)
            elif isinstance(event, AllBlocksCleared):
                self.saw("cleared")
                self.told.clear()
            else:
                for block_hash in event.block_hashes:
                    del self.told[block_hash]
        current = {
            prefix
            for prefix, computed in self.model.computed.items()
            if computed and prefix[0][0] == self.model.resets
        }
        assert set(self.told.values()) == current
        assert len(self.events) == len(current)

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
            chunk_ids = list(handle.chunk_ids)
            if handle in self.waiting:  # then the source still holds what the copy will bring
                chunk_ids[sequence.num_matched // CHUNK] = self.waiting[handle].source_chunk
            assert self.pool.read(chunk_ids, computed) == sequence.beginnings(computed)

    def rows_are_contiguous(self) -> None:
        rows = self.tree.rows()
        assert set(rows) == set(self.pairs)
        for chunk_id in range(self.tree.num_chunks):
            covered = [index for index, row in enumerate(rows) if chunk_id in row.chunk_ids]
            assert not covered or covered[-1] - covered[0] == len(covered) - 1


def test_random_operations_agree_with_the_model():
    missed = run_until_seen(PrefixTreeMachine, EVENTS, max_examples=120)
    assert PrefixTreeMachine.steps >= MIN_STEPS
    assert not missed, f"never happened in {PrefixTreeMachine.steps} steps: {missed}"
