"""Heads with windows have fewer chunks: whatever happens, every query finds what it reads."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.prefix_tree import PrefixTree
from jax_chunkattn.tree.window_room import WindowRoom
from pallas_kernels.windows import Window

CHUNK = 4
CALL = 12
STEPS = 3


def room_for(window: Window, sequences: int, more: int = 0) -> WindowRoom:
    """For so many sequences at once, and so many chunks more."""
    needed = WindowRoom(1, window, STEPS, CALL).needed(sequences, CHUNK)
    return WindowRoom(needed + more, window, STEPS, CALL)


class Device:
    """A tree, and what a pool would hold: of each token in a chunk, all tokens up to it.

    Checks every read of a query that is computed, for heads that see all and for those with the
    window; and that nothing is written again that others read.
    """

    def __init__(self, window: Window, num_chunks: int, room: WindowRoom):
        self.window = window
        self.tree = PrefixTree(num_chunks, CHUNK, window_room=room)
        self.full: dict[tuple[int, int], tuple] = {}
        self.windowed: dict[tuple[int, int], tuple] = {}
        self.tokens: dict = {}
        self.computed_tokens = self.computed_again = 0

    def insert(self, tokens: list[int]):
        sequence = self.tree.insert(tokens, copy_partial=True)
        self.tokens[sequence] = list(tokens)
        if sequence.copy is not None:
            pair = sequence.copy.source_chunk, sequence.copy.destination_chunk
            self._copy([pair], sequence.window_copies)
        return sequence

    def fork(self, sequence):
        child, copies = self.tree.fork(sequence)
        self.tokens[child] = list(self.tokens[sequence])
        self._copy(copies, child.window_copies)
        return child

    def compute(self, sequence) -> bool:
        """A call for one sequence; whether it had anything to compute."""
        tokens, tree = self.tokens[sequence], self.tree
        known = tree.computed_tokens(sequence)
        tree.expect(sequence, known)
        if known == len(tokens):
            return False
        end = min(known + CALL, len(tokens))
        if end < len(tokens):
            end -= end % CHUNK
        stored = max(known, tree.stored_tokens(sequence))
        fresh = tree.fill(sequence, known, end)
        for position in range(known, end):
            new = position >= stored
            self._write(sequence, position, full=new, windowed=new or position // CHUNK in fresh)
        for position in range(known, end):
            self._read(sequence, position)
        self.computed_tokens += end - known
        self.computed_again += max(0, min(stored, end) - known)
        tree.mark_computed(sequence, end)
        return True

    def decode(self, sequence, number: int) -> None:
        """Some tokens more, which depend on those before them alone."""
        tokens, begin = self.tokens[sequence], len(self.tokens[sequence])
        self.tree.reserve(sequence, number)
        for _ in range(number):
            tokens.append(sum(tokens[-5:]) % 3)
            self._write(sequence, len(tokens) - 1, full=True, windowed=True)
            self._read(sequence, len(tokens) - 1)
        self.tree.append(sequence, tokens[begin:])

    def release(self, sequence) -> None:
        self.tree.release(sequence)
        del self.tokens[sequence]

    def _place(self, sequence, position: int) -> tuple[tuple[int, int], tuple[int, int]]:
        chunk, offset = sequence.chunk_ids[position // CHUNK], position % CHUNK
        ids = self.tree.window_ids
        assert ids is not None
        return (chunk, offset), (int(ids[chunk]), offset)

    def _write(self, sequence, position: int, *, full: bool, windowed: bool) -> None:
        content = tuple(self.tokens[sequence][: position + 1])
        in_full, in_windowed = self._place(sequence, position)
        if full:
            self.full[in_full] = content
        if windowed:
            assert in_windowed[0] < self.tree.num_chunks
            self.windowed[in_windowed] = content

    def _read(self, sequence, position: int) -> None:
        tokens = self.tokens[sequence]
        for key in range(position + 1):
            content = tuple(tokens[: key + 1])
            in_full, in_windowed = self._place(sequence, key)
            assert self.full[in_full] == content
            if key < self.window.sinks or key > position - self.window.size:
                assert self.windowed[in_windowed] == content, (position, key)

    def _copy(self, copies, window_copies) -> None:
        for held, pairs in ((self.full, copies), (self.windowed, window_copies)):
            old = dict(held)
            for source, destination in pairs:
                for offset in range(CHUNK):
                    held.pop((destination, offset), None)
                    if (source, offset) in old:
                        held[destination, offset] = old[source, offset]


WINDOWS = [Window(1), Window(4), Window(6), Window(5, sinks=6), Window(19)]


@pytest.mark.parametrize(("sequences", "more"), [(2, 0), (3, 4), (5, 40)])
def test_every_query_finds_what_it_reads_whatever_happens(sequences, more):
    random = np.random.default_rng(sequences)
    found = again = 0
    for window in WINDOWS * 5:
        device = Device(window, int(random.integers(20, 120)), room_for(window, sequences, more))
        prompts: list[list[int]] = []
        for _ in range(60):
            active = list(device.tokens)
            action = random.choice(
                ["insert", "insert", "compute", "compute", "decode", "fork", "release", "evict"]
            )
            try:
                if action == "insert" or not active:
                    base = prompts[random.integers(len(prompts))] if prompts else []
                    cut = int(random.integers(len(base) + 1))
                    own = random.integers(0, 3, random.integers(1, 30)).tolist()
                    prompts.append([*base[:cut], *own][:70])
                    sequence = device.insert(prompts[-1])
                    found += sequence.num_cached_tokens
                    continue
                one = active[random.integers(len(active))]
                whole = device.tree.computed_tokens(one) == len(device.tokens[one])
                if action == "compute":
                    device.compute(active[0])  # in the order they came
                elif action == "decode" and whole:
                    for _ in range(random.integers(1, 5)):
                        device.decode(one, int(random.integers(1, STEPS + 1)))
                elif action == "fork" and whole:
                    device.fork(one)
                elif action == "evict":
                    device.tree.evict(int(random.integers(4)))
                elif action == "release":
                    device.release(one)
            except PoolExhausted:
                device.release(active[-1])
            finally:
                device.tree.check()
        while device.tokens:
            first = next(iter(device.tokens))
            while device.compute(first):
                device.tree.check()
            device.release(first)
        device.tree.check()
        assert device.tree.window_in_use_count == 0
        again += device.computed_again
    assert found > 0
    assert more or again > 0


def long_prompt(end: int = 0) -> list[int]:
    return [*np.random.default_rng(1).integers(0, 3, 60).tolist(), *[end] * 4]


def computed(device: Device, tokens: list[int]):
    """A sequence that is computed, and how many tokens that took."""
    before = device.computed_tokens
    sequence = device.insert(tokens)
    while device.compute(sequence):
        pass
    return sequence, device.computed_tokens - before


def test_a_long_prompt_needs_no_more_than_its_window_and_a_call():
    device = Device(Window(6), 20, room_for(Window(6), 1))
    _, count = computed(device, long_prompt())
    assert count == 64
    assert device.tree.window_in_use_count == 2  # tokens 58 to 63
    assert device.tree.in_use_count == 16


def test_what_windows_have_left_is_found_until_the_room_is_needed():
    device = Device(Window(6), 40, room_for(Window(6), 1, more=10))
    device.release(computed(device, long_prompt())[0])
    sequence, count = computed(device, long_prompt(end=1))
    assert count == 4  # the end, which differs
    device.release(sequence)
    device.release(computed(device, [1, 2] * 20)[0])  # takes what was passed by
    sequence = device.insert(long_prompt()[:20])
    assert sequence.num_matched_tokens == 20
    assert sequence.num_cached_tokens == 0


def test_where_somebody_has_begun_stays_longer_than_what_was_passed_by():
    window = Window(6)
    device = Device(window, 80, room_for(window, 1, more=12))
    device.release(computed(device, long_prompt())[0])
    for end in (1, 2):  # both go on behind 32 tokens
        device.release(computed(device, [*long_prompt()[:32], *[end] * 20])[0])
    device.release(computed(device, [2, 1] * 20)[0])
    assert device.tree.match([*long_prompt()[:32], 0]).num_tokens == 32
    assert device.tree.match(long_prompt()[:24]).num_tokens == 0


def test_what_others_are_to_compute_counts_as_found():
    window = Window(6)
    device = Device(window, 40, room_for(window, 2))
    first = device.insert(long_prompt())
    second = device.insert(long_prompt(end=1))
    assert second.num_cached_tokens == 60
    while device.compute(first):
        pass
    before = device.computed_tokens
    while device.compute(second):
        pass
    assert device.computed_tokens - before == 4


def test_who_waited_computes_what_nobody_will():
    window = Window(6)
    device = Device(window, 40, room_for(window, 2))
    first = device.insert(long_prompt())
    second = device.insert(long_prompt(end=1))
    for _ in range(2):
        device.compute(first)
    device.release(first)
    before = device.computed_tokens
    while device.compute(second):
        device.tree.check()
    assert device.computed_tokens - before == 64 - 2 * CALL


def test_the_beginning_of_a_chunk_is_copied_though_it_is_evicted_for_the_copy():
    window = Window(6)
    device = Device(window, 5, room_for(window, 1, more=5))
    prompt = long_prompt()
    for cached in (prompt[:12], [0, 0, 1, 1]):
        device.release(computed(device, cached)[0])
    sequence, count = computed(device, [*prompt[:10], *[2 - token for token in prompt[10:18]]])
    assert device.tree.num_evicted == 2
    assert sequence.num_cached_tokens == 10
    assert count == 8


def test_sequences_beyond_the_room_are_refused_and_nothing_changes():
    window = Window(6)
    device = Device(window, 40, room_for(window, 2))
    for end in (1, 2):
        device.insert(long_prompt(end))
    free = device.tree.free_count
    assert device.tree.room_after_insert([1]) < 0
    with pytest.raises(PoolExhausted, match="no chunks for one more"):
        device.insert([1])
    assert device.tree.free_count == free
    device.tree.check()


def test_too_little_room_for_one_is_refused():
    with pytest.raises(ValueError, match="a sequence may need 6 chunks of 4 tokens"):
        PrefixTree(40, CHUNK, window_room=WindowRoom(5, Window(6), STEPS, CALL))
    with pytest.raises(ValueError, match="ahead must be at least 1"):
        WindowRoom(6, Window(6), 0, CALL)


def test_room_is_asked_for_a_call_at_a_time():
    device = Device(Window(6), 40, room_for(Window(6), 1))
    sequence = device.insert(long_prompt())
    with pytest.raises(ValueError, match="room for 13 tokens at once, at most 12"):
        device.tree.fill(sequence, 0, 13)
