"""Every prompt token is counted once, under the reason why it was or was not in the cache."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_chunkattn.engine.misses import PrefixMemory, PromptUse

CHUNK = 4
OURS, THEIRS = b"ours", b"theirs"


def make_memory(max_prefixes: int = 100) -> PrefixMemory:
    return PrefixMemory(CHUNK, max_prefixes)


def prompt(*chunks: int, extra: int = 0) -> list[int]:
    """Chunks of one repeated token each, and ``extra`` tokens behind them."""
    return [token for token in chunks for _ in range(CHUNK)] + [99] * extra


def test_a_prompt_never_seen_is_new_but_for_what_no_chunk_can_hold():
    assert make_memory().classify(prompt(1, 2, extra=3), OURS, 0, 0) == PromptUse(
        new=2 * CHUNK, too_short=3
    )
    assert make_memory().classify([1, 2], OURS, 0, 0) == PromptUse(too_short=2)


def test_a_prompt_seen_before_and_not_found_was_evicted():
    memory = make_memory()
    memory.classify(prompt(1, 2), OURS, 0, 0)
    assert memory.classify(prompt(1, 2, 3), OURS, CHUNK, 0) == PromptUse(
        hit=CHUNK, evicted=CHUNK, new=CHUNK
    )


def test_prompts_that_diverge_share_what_they_begin_with_and_no_more():
    memory = make_memory()
    memory.classify(prompt(1, 2, 3), OURS, 0, 0)
    assert memory.classify(prompt(1, 5, 3), OURS, CHUNK, 0) == PromptUse(hit=CHUNK, new=2 * CHUNK)


def test_a_prompt_known_under_another_salt_only_is_told_so():
    memory = make_memory()
    memory.classify(prompt(1, 2), THEIRS, 0, 0)
    assert memory.classify(prompt(1, 2, 3), OURS, 0, 0) == PromptUse(salt=2 * CHUNK, new=CHUNK)
    assert memory.classify(prompt(1, 2), OURS, 0, 0) == PromptUse(evicted=2 * CHUNK)
    assert memory.classify(prompt(1, 2, 3), THEIRS, 0, 0) == PromptUse(
        evicted=2 * CHUNK, salt=CHUNK
    )


@pytest.mark.parametrize(
    ("tokens", "hit", "copied", "use"),
    [
        (prompt(1, 2), 2 * CHUNK, 0, PromptUse(hit=2 * CHUNK - 1, last=1)),
        (prompt(1, extra=3), CHUNK, 3, PromptUse(hit=CHUNK, copied=2, last=1)),
        (prompt(1, extra=3), CHUNK, 2, PromptUse(hit=CHUNK, copied=2, too_short=1)),
        (prompt(1, 2, extra=1), CHUNK, 3, PromptUse(hit=CHUNK, copied=3, new=1, too_short=1)),
        (prompt(1, 2), 0, CHUNK, PromptUse(copied=CHUNK, new=CHUNK)),
        (prompt(extra=1), 0, 1, PromptUse(last=1)),
    ],
)
def test_copied_tokens_and_the_last_one_are_counted_apart(tokens, hit, copied, use):
    assert make_memory().classify(tokens, OURS, hit, copied) == use


def test_where_chunks_are_encoded_the_last_one_is_computed_again():
    memory = PrefixMemory(CHUNK, 10, last_tokens=CHUNK)
    assert memory.classify(prompt(1, 2), OURS, 2 * CHUNK, 0) == PromptUse(hit=CHUNK, last=CHUNK)
    used = memory.classify(prompt(1, 2, extra=1), OURS, 2 * CHUNK, 0)
    assert used == PromptUse(hit=2 * CHUNK, too_short=1)


def test_generated_text_is_remembered_when_told():
    memory = make_memory()
    memory.classify(prompt(1), OURS, 0, 0)
    memory.remember(prompt(1, 2, 3, extra=2), OURS, from_chunk=2)
    assert len(memory) == 2
    assert memory.classify(prompt(1, 2, 3), OURS, 0, 0) == PromptUse(evicted=2 * CHUNK, new=CHUNK)


def test_arrays_and_lists_are_the_same_prompt():
    memory = make_memory()
    memory.remember(np.array(prompt(1, 2), np.int64), OURS)
    assert memory.classify(prompt(1, 2), OURS, 0, 0).evicted == 2 * CHUNK


def test_the_longest_prefixes_of_the_prompt_used_least_recently_are_forgotten():
    memory = make_memory(max_prefixes=4)
    memory.remember(prompt(1, 2), OURS)
    memory.remember(prompt(3, 4), OURS)
    memory.remember(prompt(1, 2), OURS)
    memory.remember(prompt(5), OURS)
    assert len(memory) == 4
    assert memory.classify(prompt(3, 4), OURS, 0, 0) == PromptUse(evicted=CHUNK, new=CHUNK)


def test_memory_stays_bounded():
    memory = make_memory(max_prefixes=10)
    for token in range(50):
        memory.remember(prompt(*[token] * 30), OURS if token % 2 else THEIRS)
        assert len(memory) <= 10
    assert memory.classify(prompt(0), THEIRS, 0, 0) == PromptUse(new=CHUNK)
    assert memory.classify(prompt(49), OURS, 0, 0) == PromptUse(evicted=CHUNK)


def test_a_prefix_forgotten_under_its_salt_is_not_blamed_on_another():
    """Under two salts the memory is full sooner than without."""
    memory = make_memory(max_prefixes=4)
    memory.remember(prompt(1), OURS)
    for salt in (OURS, THEIRS):
        memory.remember(prompt(2, 3), salt)
    assert memory.classify(prompt(1), OURS, 0, 0) == PromptUse(evicted=CHUNK)


def test_after_forgetting_everything_is_new():
    memory = make_memory()
    memory.classify(prompt(1, 2), OURS, 0, 0)
    memory.forget()
    assert len(memory) == 0
    assert memory.classify(prompt(1, 2), OURS, 0, 0) == PromptUse(new=2 * CHUNK)


def test_uses_add_up():
    total = sum([PromptUse(hit=3, new=1), PromptUse(hit=4, last=1)], PromptUse())
    assert total == PromptUse(hit=7, new=1, last=1)
    assert total.num_tokens == 9


class ModelMemory:
    """Whole prefixes in a set, none of which is ever forgotten."""

    def __init__(self):
        self.known: set[tuple[bytes, tuple[int, ...]]] = set()

    def reason(self, prefix: tuple[int, ...], salt: bytes) -> str:
        if (salt, prefix) in self.known:
            return "evicted"
        return "salt" if any(prefix == known for _, known in self.known) else "new"


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=4 * CHUNK + 3)


@given(
    prompts=st.lists(st.tuples(PROMPTS, st.sampled_from([OURS, THEIRS])), max_size=8),
    data=st.data(),
)
def test_counts_are_those_of_a_memory_of_whole_prompts(prompts, data):
    memory, model = make_memory(), ModelMemory()
    for tokens, salt in prompts:
        num_full = len(tokens) // CHUNK
        num_hit = data.draw(st.integers(0, num_full))
        behind = len(tokens) - num_hit * CHUNK
        copied = data.draw(st.integers(0, min(behind, CHUNK)))
        use = memory.classify(tokens, salt, num_hit * CHUNK, copied)

        prefixes = [tuple(tokens[: count * CHUNK]) for count in range(1, num_full + 1)]
        expected = {"new": 0, "evicted": 0, "salt": 0}
        for prefix in prefixes[num_hit:]:
            expected[model.reason(prefix, salt)] += CHUNK
        if num_hit < num_full:
            expected[model.reason(prefixes[num_hit], salt)] -= copied
        model.known |= {(salt, prefix) for prefix in prefixes}

        assert use.num_tokens == len(tokens)
        assert use.last == (behind == copied)
        assert use.hit + use.copied + use.last == num_hit * CHUNK + copied
        assert {name: getattr(use, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("hit", "copied", "message"),
    [
        (CHUNK - 1, 0, "hit_tokens"),
        (-CHUNK, 0, "hit_tokens"),
        (3 * CHUNK, 0, "hit_tokens"),
        (0, CHUNK + 1, "copied_tokens"),
        (2 * CHUNK, 2, "copied_tokens"),
        (0, -1, "copied_tokens"),
    ],
)
def test_counts_that_do_not_fit_are_refused_and_nothing_is_remembered(hit, copied, message):
    memory = make_memory()
    with pytest.raises(ValueError, match=message):
        memory.classify(prompt(1, 2, extra=1), OURS, hit, copied)
    assert len(memory) == 0


def test_bad_options_and_tokens_are_refused():
    for options in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            PrefixMemory(*options)
    with pytest.raises(ValueError, match="empty"):
        make_memory().classify([], OURS, 0, 0)
    with pytest.raises(ValueError, match="from_chunk"):
        make_memory().remember(prompt(1), OURS, from_chunk=-1)
