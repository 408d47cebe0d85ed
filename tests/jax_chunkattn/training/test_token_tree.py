"""Packing sequences into a tree: each token once, seeing what it sees in its sequence."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_chunkattn import TokenTree
from jax_chunkattn.training.token_tree import padded_size
from tests.effort import examples

TOKENS = st.lists(st.integers(0, 2), min_size=2, max_size=9)
CASES = st.lists(TOKENS.flatmap(lambda s: st.tuples(st.just(s), st.integers(1, len(s) - 1))))


@settings(max_examples=examples(100, 3000), deadline=None)
@given(CASES.filter(bool))
def test_a_tree_is_the_prefixes_of_its_sequences(cases):
    sequences, begins = zip(*cases, strict=True)
    tree = TokenTree.of(sequences, begins)
    prefixes = {tuple(s[:end]) for s in sequences for end in range(1, len(s) + 1)}
    assert tree.num_tokens == len(prefixes)
    assert tree.places.shape == (
        len(sequences),
        max(len(s) - begin for s, begin in zip(sequences, begins, strict=True)),
    )
    seen = np.asarray(tree.plan.sees(0, 0, len(tree.tokens)))
    assert not seen[len(prefixes) :].any()
    packed = {}
    for sequence, begin, places in zip(sequences, begins, tree.places, strict=True):
        asked = places[: len(sequence) - begin]
        assert np.all(places[len(asked) :] == len(tree.tokens))
        assert tree.tokens[asked].tolist() == list(sequence[begin:])
        for place, end in zip(asked, range(begin, len(sequence)), strict=True):
            before = tree.previous[place]
            path = np.nonzero(seen[before])[0]
            assert tree.tokens[path].tolist() == list(sequence[:end])
            assert tree.plan.positions[path].tolist() == list(range(end))
            assert packed.setdefault(tuple(sequence[:end]), before) == before
    asked = {tuple(s[: end + 1]) for s, b in cases for end in range(b, len(s))}
    assert len(np.unique(tree.places[tree.mask])) == len(asked)
    assert np.sum(tree.previous < len(tree.tokens)) == len(asked)
    np.testing.assert_array_equal(tree.mask, tree.places != len(tree.tokens))


def test_all_tokens_but_the_first_are_asked_for_by_default():
    tree = TokenTree.of([[5, 6, 7], [5, 8]])
    assert tree.tokens[tree.places[0]].tolist() == [6, 7]
    assert tree.mask.tolist() == [[True, True], [True, False]]


def test_a_width_and_a_size_leave_room():
    tree = TokenTree.of([np.array([5, 6, 7])], [2], width=4)
    assert tree.mask.tolist() == [[True, False, False, False]]
    assert len(tree.tokens) == 128
    assert len(TokenTree.of([[5, 6, 7]], min_tokens=1025).tokens) == 1152


@pytest.mark.parametrize(
    ("sequences", "how", "message"),
    [
        ([], {}, "a tree of tokens is of one sequence at least"),
        ([[1, 2]], {"begins": [1, 1]}, "there are 1 sequences, and 2 begins"),
        ([[1, 2], [3]], {}, "sequence 1 has 1 tokens and 1 of them given"),
        ([[1, 2]], {"begins": [2]}, "sequence 0 has 2 tokens and 2 of them given"),
        ([[1, 2]], {"begins": [0]}, "sequence 0 has 2 tokens and 0 of them given"),
        ([[1, -2]], {}, "sequence 0 has a token id that is no int32"),
        ([[1, 1 << 31]], {}, "sequence 0 has a token id that is no int32"),
        ([[1.0, 2.0]], {}, "sequence 0 is no sequence of whole numbers"),
        ([[1, 2, 3]], {"width": 1}, "2 tokens of a sequence are asked for, and width is 1"),
    ],
)
def test_what_is_no_tree_is_refused(sequences, how, message):
    with pytest.raises(ValueError, match=message):
        TokenTree.of(sequences, **how)


def test_at_most_an_eighth_is_padding_in_eight_sizes_to_each_power():
    sizes = [padded_size(count, 64) for count in range(1, 5000)]
    for count, size in enumerate(sizes, 1):
        assert size % 64 == 0
        assert count <= size < max(count + 64, count * 9 / 8)
    assert len({size for size in sizes if 1024 < size <= 2048}) == 8


def test_many_long_sequences_are_packed_in_little_time_for_each():
    """A token of a sequence is touched a fixed number of times."""
    prompt = np.arange(2000)
    tree = TokenTree.of([np.append(prompt, [i, *range(100)]) for i in range(256)], [2000] * 256)
    assert tree.num_tokens == 2000 + 256 * 101
