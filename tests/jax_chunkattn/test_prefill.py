from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from jax_chunkattn.prefill import CALL_TOKENS, Segment, max_segments, next_call


def segments_of(lengths):
    return [
        (owner, Segment(list(range(length)), [owner], begin=5, end=5 + length, write_from=5))
        for owner, length in enumerate(lengths)
    ]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=60))
def test_calls_take_every_token_once_in_order_and_never_more_than_fits(lengths):
    work = segments_of(lengths)
    left = sum(lengths)
    taken = [[] for _ in lengths]
    order = []
    while work:
        call, work, num_tokens = next_call(work, left)
        assert 1 <= len(call) <= max_segments(num_tokens)
        used = 0
        for owner, segment in call:
            assert segment.begin == 5 + len(taken[owner])
            assert segment.end - segment.begin == len(segment.tokens) > 0
            taken[owner] += segment.tokens
            order.append(owner)
            used += len(segment.tokens)
        assert used <= num_tokens
        left -= used
    assert left == 0
    assert taken == [list(range(length)) for length in lengths]
    assert order == sorted(order)


def test_a_call_is_as_small_as_what_is_left_allows():
    for left, expected in ((1, 32), (32, 32), (33, 128), (128, 128), (129, 512), (9000, 512)):
        assert next_call(segments_of([left]), left)[2] == expected
    assert CALL_TOKENS == (32, 128, 512)


def test_one_call_takes_no_more_segments_than_it_has_room_for():
    call, rest, num_tokens = next_call(segments_of([1] * 40), 40)
    assert (len(call), len(rest), num_tokens) == (8, 32, 128)
