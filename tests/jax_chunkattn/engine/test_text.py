"""Streamed text is the decoded text, cut at the first stop string, however the tokens come."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jax_chunkattn.engine.text import REPLACEMENT, TextStream, Tokenizer, open_stream
from models.tokenizer import ChatTokenizer
from tests.jax_chunkattn.engine.fake_tokenizers import (
    AllSpaceTokenizer,
    ByteFallbackTokenizer,
    ByteTokenizer,
    FirstSpaceTokenizer,
    SingleByteTokenizer,
)
from tests.models.tokenizer_styles import GOLDEN, TEXTS, read_golden

EMOJI = "😀".encode()
STOPS = ["a", "ab", "aab", "b a", "bb", "  ", "€", "😀a", "é€"]
PIECES = [
    *[b"", b"", b"a", b"b", b" ", b"  ", b" a", b"aab"],  # b"" is a special token
    *[b"\xe2", b"\x82", b"\xac", b"\xf0", b"\x9f", b"\x98", b"\x80"],  # of a euro sign and EMOJI
    *[b"\xf0\x9f", b"\x98\x80", b"\xac a", b" b\xe2\x82", "é€😀".encode()],
    *[b"\xff", b"\xac\xff", b"\xff\xff\xff\xff\xff"],
    *[b"\xef\xbf\xbd", b"\xef\xbf", b"\xbd"],  # a genuine U+FFFD
]
WORDS = [*"aé€😀👩 🎉b好\n", " hello", "wor", "  ", " aab", "你好", ""]
EXACT = [ByteTokenizer, FirstSpaceTokenizer, AllSpaceTokenizer, SingleByteTokenizer]


def tokens_of(pieces: list[bytes]) -> st.SearchStrategy[list[int]]:
    """Runs over a few of the tokens, so that the same ones come again and again."""
    some = st.lists(st.integers(0, len(pieces) - 1), min_size=1, max_size=5)
    everything = st.just(list(range(len(pieces))))
    return st.one_of(some, everything).flatmap(
        lambda chosen: st.lists(st.sampled_from(chosen), max_size=80)
    )


def byte_fallback_tokens(word: str) -> list[int]:
    """A word of the vocabulary, or a character spelt in bytes; a space is a word."""
    data = word.encode()
    return [256 + WORDS.index(word)] if len(word) != 1 or word == " " else list(data)


def stream(tokenizer, tokens, stop, sizes) -> tuple[str, int | None]:
    """The joined text, and how many of ``tokens`` were the answer if a stop string ended it."""
    texts = TextStream(tokenizer, stop)
    text, begin = "", 0
    for size in sizes:
        piece = texts.push(tokens[begin : begin + size])
        text += piece.text
        if piece.stopped_after is not None:
            assert 0 < piece.stopped_after <= size
            assert texts.finish() == ""
            return text, begin + piece.stopped_after
        begin += size
    assert begin >= len(tokens)
    return text + texts.finish(), None


def decoded(tokenizer, tokens, stop) -> tuple[str, int | None]:
    """What `stream` should give, by decoding everything once for each token."""
    text = tokenizer.decode(tokens)
    for end in range(len(text) + 1):
        if begins := [end - len(string) for string in stop if text[:end].endswith(string)]:
            counts = range(1, len(tokens) + 1)
            whole = (n for n in counts if tokenizer.decode(tokens[:n]).startswith(text[:end]))
            return text[: min(begins)], next(whole)
    return text, None


def cuts(data, num_tokens: int) -> list[int]:
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 50]), min_size=1, max_size=4))
    return sizes * (num_tokens // max(sum(sizes), 1) + 1) if sum(sizes) else [num_tokens]


@pytest.mark.parametrize("kind", EXACT)
@settings(max_examples=300, deadline=None)
@given(tokens=tokens_of(PIECES), stop=st.lists(st.sampled_from(STOPS), max_size=3), data=st.data())
def test_pieces_are_the_decoded_text_up_to_the_first_stop_string(kind, tokens, stop, data):
    tokenizer = kind(PIECES)
    sizes = cuts(data, len(tokens))
    assert stream(tokenizer, tokens, stop, sizes) == decoded(tokenizer, tokens, stop)


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), max_size=40),
    stop=st.lists(st.sampled_from(STOPS), max_size=3),
    data=st.data(),
)
def test_valid_text_spelt_in_fallback_bytes_streams_exactly(words, stop, data):
    pieces = [bytes([byte]) for byte in range(256)] + [word.encode() for word in WORDS]
    tokenizer = ByteFallbackTokenizer(pieces)
    special = len(pieces) - 1
    gaps = data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 4]), min_size=1, max_size=10))
    tokens = []
    for token in (token for word in words for token in byte_fallback_tokens(word)):
        tokens += [token, *[special] * gaps[len(tokens) % len(gaps)]]
    assert "\ufffd" not in tokenizer.decode(tokens)
    sizes = cuts(data, len(tokens))
    assert stream(tokenizer, tokens, stop, sizes) == decoded(tokenizer, tokens, stop)


@functools.cache
def styled(style: str) -> tuple[ChatTokenizer, list[int], dict[str, list[int]]]:
    """A tokenizer, its tokens that are whole characters, and characters spelt in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = read_golden(Path(folder), style)
    vocabulary = GOLDEN[style]["files"]["tokenizer.json"]["model"]["vocab"]
    in_bytes = "<0x00>" in vocabulary  # a byte-level vocabulary has no other spelling to offer
    spelt = {
        word: [vocabulary[f"<0x{byte:02X}>"] for byte in word.encode()]
        if in_bytes
        else tokenizer.encode(word)
        for word in "é€😀 \n\x00你"
    }
    ids = range(tokenizer.vocab_size)
    return tokenizer, [i for i in ids if REPLACEMENT not in tokenizer.decode([i])], spelt


@pytest.mark.parametrize("style", GOLDEN)
@settings(max_examples=100, deadline=None)
@given(stop=st.lists(st.sampled_from([*STOPS, "the"]), max_size=2), data=st.data())
def test_text_of_every_style_of_tokenizer_streams_exactly(style, stop, data):
    tokenizer, words, spelt = styled(style)
    special = sorted(tokenizer.special_ids)
    token = st.one_of(
        st.sampled_from(words).map(lambda index: [index]),
        st.sampled_from(sorted(spelt)).map(spelt.__getitem__),
        st.sampled_from([text for text in TEXTS if REPLACEMENT not in text]).map(tokenizer.encode),
        st.sampled_from(special).map(lambda index: [index] * 3),
    )
    tokens = [index for part in data.draw(st.lists(token, max_size=20)) for index in part]
    if gap := data.draw(st.sampled_from([0, 0, 2, 5])):  # special tokens inside characters too
        tokens = [index for token in tokens for index in (token, *special[: token % gap])]
    assume(REPLACEMENT not in tokenizer.decode(tokens))
    sizes = cuts(data, len(tokens))
    assert stream(tokenizer, tokens, stop, sizes) == decoded(tokenizer, tokens, stop)


@pytest.mark.parametrize("style", ["llama2", "mistral", "phi3"])
def test_a_first_space_spelt_as_a_byte_is_stripped_and_spoils_nothing(style):
    tokenizer, _, spelt = styled(style)
    texts = TextStream(tokenizer)
    assert [texts.push([index]).text for index in spelt[" "] + spelt["😀"]] == [*[""] * 4, "😀"]


@settings(max_examples=100, deadline=None)
@given(before=tokens_of(PIECES), ours=tokens_of(PIECES), theirs=tokens_of(PIECES))
def test_a_copy_goes_on_by_itself(before, ours, theirs):
    tokenizer = FirstSpaceTokenizer(PIECES)
    stop = ["aab", "€"]
    mine = TextStream(tokenizer, stop)
    begin = mine.push(before)
    if begin.stopped_after is not None:
        assert mine.copy().finish() == ""
        return
    copy = mine.copy()
    for texts, tokens in ((mine, ours), (copy, theirs)):
        piece = texts.push(tokens)
        text = begin.text + piece.text + texts.finish()
        count = None if piece.stopped_after is None else len(before) + piece.stopped_after
        assert (text, count) == decoded(tokenizer, before + tokens, stop)


def test_a_character_split_over_four_tokens_comes_whole_and_at_once():
    texts = TextStream(ByteTokenizer([bytes([byte]) for byte in EMOJI]))
    assert [texts.push([token]).text for token in range(4)] == ["", "", "", "😀"]
    assert texts.finish() == ""


def test_text_that_cannot_change_is_not_held_back():
    texts = TextStream(ByteTokenizer([b"a b", b"\xe2", b"\x82\xac!"]), stop=["!!", "c"])
    assert [texts.push([token]).text for token in (0, 1, 2, 0)] == ["a b", "", "€", "!a b"]


def test_genuine_replacement_characters_do_not_hold_the_stream_for_ever():
    texts = TextStream(ByteTokenizer([b"\xff", "\ufffd".encode(), b"x"]))
    assert texts.push([0]).text == ""
    assert len(texts.push([0] * 9).text) >= 7
    assert len(texts.push([1] * 9).text) >= 9
    assert texts.push([2]).text.endswith("\ufffdx")


def test_a_stop_string_over_three_tokens_is_never_shown():
    texts = TextStream(ByteTokenizer([b"yes\n", b"Us", b"er:", b" and so on"]), stop=["\nUser:"])
    assert texts.push([0]) == ("yes", None)
    assert texts.push([1]) == ("", None)
    assert texts.push([2, 3]) == ("", 1)
    assert texts.finish() == ""


def test_a_beginning_that_came_to_nothing_is_shown():
    texts = TextStream(ByteTokenizer([b"yes\n", b"Us", b"ual"]), stop=["\nUser:"])
    assert [texts.push([token]).text for token in range(3)] == ["yes", "", "\nUsual"]


def test_what_is_held_back_comes_with_the_end():
    texts = TextStream(ByteTokenizer([b"a sto", b"\xe2\x82"]), stop=["stop"])
    assert texts.push([0]).text == "a "
    assert texts.push([1]).text == ""
    assert texts.finish() == "sto\ufffd"
    held = TextStream(ByteTokenizer([b"a sto"]), stop=["stop"])
    assert held.push([0]).text == "a "
    assert held.finish() == "sto"
    assert held.finish() == ""


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "count"),
    [
        ([b"aaab"], ["aab"], "a", 1),
        ([b"a", b"a", b"a", b"b"], ["aab"], "a", 4),
        ([b"x", b"ab", b"c"], ["ab", "abc"], "x", 2),  # a beginning of another ends first
        ([b"x", b"ab", b"c"], ["bc", "abc"], "x", 3),  # both end here: the one that begins first
        ([b"xabcd"], ["bcd", "abc"], "x", 1),
        ([b"a", b"b", b"stop here", b"c"], ["stop"], "ab", 3),  # text behind it, in its token
        ([b"stop"], ["stop"], "", 1),
        ([b"", b"s", b"", b"top", b""], ["stop"], "", 4),  # special tokens in between
        ([b"a", EMOJI[:2], EMOJI[2:], b"b"], ["😀"], "a", 3),
    ],
)
def test_which_stop_string_wins_and_where_the_answer_ends(pieces, stop, text, count):
    tokenizer = ByteTokenizer(pieces)
    tokens = list(range(len(pieces)))
    assert stream(tokenizer, tokens, stop, [len(tokens)]) == (text, count)
    assert stream(tokenizer, tokens, stop, [1] * len(tokens)) == (text, count)


@pytest.mark.parametrize(
    ("pieces", "pushes", "texts"),
    [
        ([b" the", b" cat", b""], [[2], [0], [1], [2], [1]], ["", "the", " cat", "", " cat"]),
        ([b" cat", b" "], [[1], [0], [1, 1], [0]], ["", " cat", "  ", " cat"]),
        ([b" cat", b""], [[0] * 4 + [1] * 20, [1], [0]], ["cat cat cat cat", "", " cat"]),
    ],
)
def test_only_the_first_word_loses_its_space(pieces, pushes, texts):
    first = TextStream(FirstSpaceTokenizer(pieces))
    assert [first.push(tokens).text for tokens in pushes] == texts


def test_a_replacement_character_that_was_three_counts_once():
    tokenizer = SingleByteTokenizer([b"\xbd", b"\xef\xbf", b"x"])
    tokens = [0, 0, 1, 0, 2]
    assert tokenizer.decode(tokens) == "\ufffd" * 3 + "x"
    for count in (4, 5):
        expected = (tokenizer.decode(tokens[:count]), None)
        assert stream(tokenizer, tokens[:count], [], [1] * count) == expected


def test_text_before_many_bad_bytes_is_given_once():
    tokenizer = FirstSpaceTokenizer([b" b\xe2\x82", b"\xff", b"\x98\x80"])
    assert stream(tokenizer, [0, 1, 2], [], [1] * 3) == ("b" + "\ufffd" * 4, None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 8, 1_000])
@pytest.mark.parametrize(
    "pieces",
    [
        [b"word "],
        [b""],
        [b" ", *[b""] * 20],
        [b"\xe2", *[b""] * 20],
        [b"a", *[b""] * 20],
        [b"\xff"],
        [bytes([byte]) for byte in EMOJI],
        [b"\x98", b"\x80", b"\xf0", b"\x9f"],
        [b"\x98\x80\xf0\x9f"],
        [bytes([byte]) for byte in "你".encode()],
    ],
)
@pytest.mark.parametrize("kind", [*EXACT, ByteFallbackTokenizer])
def test_every_token_is_decoded_a_bounded_number_of_times(kind, pieces, size):
    def num_decoded(num_tokens: int) -> int:
        tokenizer = kind(pieces)
        tokens = [index % len(pieces) for index in range(num_tokens)]
        stream(tokenizer, tokens, ["zz"], [size] * -(-num_tokens // size))
        return tokenizer.num_decoded

    assert num_decoded(4_000) <= 2.2 * num_decoded(2_000)


@pytest.mark.parametrize("size", [8, 1_000])
@pytest.mark.parametrize(
    "pieces", [[b"word "], [b"a", *[b""] * 31], [bytes([byte]) for byte in EMOJI]]
)
def test_text_is_decoded_a_few_times_over_at_most(pieces, size):
    tokenizer = FirstSpaceTokenizer(pieces)
    tokens = [index % len(pieces) for index in range(1_000)]
    stream(tokenizer, tokens, ["zz"], [size] * (1_000 // size))
    assert tokenizer.num_decoded <= 4 * 1_000


def test_without_a_tokenizer_there_is_no_stream():
    assert open_stream(None) is None
    with pytest.raises(ValueError, match="need a tokenizer"):
        open_stream(None, ["stop"])
    texts = open_stream(ByteTokenizer([b"a"]), ["b"])
    assert texts is not None
    assert texts.push([0]).text == "a"


@pytest.mark.parametrize("stop", ["stop", [""], ["a", "\ufffd"], [b"a"]])
def test_bad_stop_strings_are_refused(stop):
    with pytest.raises(ValueError, match="stop"):
        TextStream(ByteTokenizer([b"a"]), stop)


def test_nothing_can_be_pushed_behind_the_end():
    stopped = TextStream(ByteTokenizer([b"a"]), ["a"])
    assert stopped.push([0]).stopped_after == 1
    finished = TextStream(ByteTokenizer([b"a"]))
    finished.finish()
    for texts in (stopped, finished):
        with pytest.raises(ValueError, match="ended"):
            texts.push([0])


def test_a_real_tokenizer_fits(smollm2_path):
    from models.gguf_file import read_gguf
    from models.gguf_tokenizer import read_gguf_tokenizer

    tokenizer: Tokenizer = read_gguf_tokenizer(read_gguf(smollm2_path))
    text = "naïve café 👩\u200d💻 你好, <|im_start|> " * 20 + "the end"
    tokens = tokenizer.encode(text)
    for size in (1, 3, 8):
        sizes = [size] * (len(tokens) // size + 1)
        assert stream(tokenizer, tokens, [], sizes) == (tokenizer.decode(tokens), None)
        before_end = tokenizer.decode(tokens).removesuffix("the end")
        assert stream(tokenizer, tokens, ["the end"], sizes) == (before_end, len(tokens))
