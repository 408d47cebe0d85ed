"""Tokens to text while they are being generated, and stop strings in that text.

Text may be shown only once nothing that follows can change it. Two things can: the rest of a UTF-8
character that tokens have split, and the rest of a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

REPLACEMENT = "\ufffd"
MAX_UNFINISHED = 3  # bytes a UTF-8 character can have without being whole

CONTEXT = 4  # tokens that later ones are decoded behind; more where these do not do
WINDOW = 16  # tokens decoded together before the window is cut back to its context
SLICE = 32  # tokens of one push decoded together


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer.

    `decode` turns bytes that are not valid UTF-8 into U+FFFD.
    """

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt's ``text``, with what the model expects around it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        ...


class Piece(NamedTuple):
    """Text that is final now; ``stopped_after`` tokens of the push end the answer, if not None."""

    text: str
    stopped_after: int | None


class _Settled(NamedTuple):
    """The text of the first ``end`` tokens of a window, and behind it what may still change."""

    text: str
    unsettled: str
    end: int


def open_stream(tokenizer: Tokenizer | None, stop: Sequence[str] = ()) -> TextStream | None:
    """A `TextStream`, or None when there is no tokenizer: then a request costs no text at all.

    Raises ValueError for a bad stop string, or any without a tokenizer.
    """
    if tokenizer is not None:
        return TextStream(tokenizer, stop)
    if stop:
        raise ValueError("stop strings need a tokenizer, and this engine was given none")
    return None


class TextStream:
    """The text of one answer, piece by piece as its tokens come.

    The pieces and what `finish` gives, joined, are ``tokenizer.decode`` of all the tokens, cut
    before the first stop string, however the tokens were cut into pushes. The stop string that
    wins is the one that is complete first; of those complete at the same character, the one that
    begins first. It ends the answer with the token that completed it.

    What is asked of ``tokenizer.decode``: more tokens behind may change only U+FFFD at the end of
    a text; and without its first tokens a text lacks its beginning, perhaps a split character and
    leading white space, but goes on the same. So byte-level BPE, WordPiece without clean-up and
    SentencePiece do. Byte fallback as the `tokenizers` library does it asks for more: one bad byte
    spoils every character spelt in bytes up to the next ordinary token, also those before it,
    which this stream has already given; valid text it streams exactly.

    Each token is decoded a bounded number of times, behind a few earlier ones whose text is cut
    off again: a tokenizer that strips the space before its first word does it there.

    Args:
      tokenizer: decodes the tokens; special tokens that it skips have no text here either.
      stop: strings that end the answer and are no part of it.

    Raises:
      ValueError: when ``stop`` is one string, or a stop string is empty or holds U+FFFD, which
        stands for bytes that are no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decode = tokenizer.decode
        self._stops = _StopStrings(stop)
        self._window: list[int] = []  # the last tokens, as far as the text to come depends on them
        self._num_given = 0  # characters of the window's text that have gone on to the stops
        self._unsettled = ""  # the rest of it
        self._ended = False

    def push(self, tokens: Sequence[int]) -> Piece:
        """Adds tokens; gives the text that has become final.

        When they complete a stop string, ``stopped_after`` says how many of them belong to the
        answer, the last of which completed it, and the stream has ended.

        Raises ValueError when the stream has ended before.
        """
        if self._ended:
            raise ValueError("tokens pushed to a text stream that has ended")
        texts = []
        for begin in range(0, len(tokens), SLICE):
            text, stopped_after = self._push_slice(list(tokens[begin : begin + SLICE]))
            texts.append(text)
            if stopped_after is not None:
                self._ended = True
                return Piece("".join(texts), begin + stopped_after)
        return Piece("".join(texts), None)

    def finish(self) -> str:
        """Ends the stream; gives the text still held back, nothing after a stop string."""
        if self._ended:
            return ""
        self._ended = True
        return self._stops.held + self._unsettled

    def copy(self) -> TextStream:
        """A stream in the same state that goes on by itself: the text of a fork."""
        copy = object.__new__(TextStream)
        copy.__dict__.update(self.__dict__)
        copy._stops = self._stops.copy()
        return copy

    def _push_slice(self, tokens: list[int]) -> tuple[str, int | None]:
        before = self._window
        window = before + tokens
        settled = self._settle(window)
        new = settled.text[self._num_given :]
        text, num_used = self._stops.push(new)
        if num_used is not None:
            answer = settled.text[: self._num_given + num_used]
            return text, self._completing_token(before, tokens, answer)
        self._num_given = max(self._num_given, len(settled.text))
        self._unsettled = settled.unsettled
        self._window = window if new else before + self._relevant(tokens)
        if new and len(window) > WINDOW:
            self._shorten(settled)
        return text, None

    def _relevant(self, tokens: list[int]) -> list[int]:
        """Of ``tokens``, which added nothing final to the window, those it cannot do without.

        Tokens without text, special ones say, would only make it long. But one without text at the
        beginning may be a space that is stripped there: until text comes, one of a kind stays.
        """
        keep = set() if self._num_given else set(tokens).difference(self._window)
        return [token for token in tokens if token in keep or self._decode([token])]

    def _settle(self, window: list[int]) -> _Settled:
        """The text of ``window``, divided where it may still change.

        Only U+FFFD at its end may stand for an unfinished character, one for all its bytes or one
        for each. Where it stands for earlier characters too (see byte fallback above), the text
        of the tokens before the unfinished character tells.
        """
        text = self._decode(window)
        if not text.endswith(REPLACEMENT):
            return _Settled(text, "", len(window))
        whole = self._last_whole(window)
        if whole is not None and not text.startswith(whole.text):
            return whole
        num_open = len(text) - len(text.rstrip(REPLACEMENT))
        num_settled = len(text) - min(MAX_UNFINISHED, num_open)
        if whole is not None and num_open > MAX_UNFINISHED:
            # More than one character's: earlier ones may be among them, say a stripped space.
            num_settled = len(whole.text)
        # A U+FFFD that tokens have split is one character, but may have been three before.
        num_settled = max(num_settled, self._num_given)
        return _Settled(text[:num_settled], text[num_settled:], len(window))

    def _last_whole(self, window: list[int]) -> _Settled | None:
        """As many of the first tokens as end in a whole character, if the rest may be a part."""
        num_parts = 0
        for end in range(len(window) - 1, -1, -1):
            if not self._decode(window[end : end + 1]):
                continue  # no text, so no part of a character
            text = self._decode(window[:end])
            if not text.endswith(REPLACEMENT):
                return _Settled(text, self._decode(window[end:]), end)
            num_parts += 1
            if num_parts == MAX_UNFINISHED:
                break
        return None

    def _completing_token(self, before: list[int], tokens: list[int], answer: str) -> int:
        """How many of ``tokens`` behind ``before`` it takes to spell ``answer``."""
        for count in range(1, len(tokens)):
            if self._decode(before + tokens[:count]).startswith(answer):
                return count
        return len(tokens)

    def _shorten(self, settled: _Settled) -> None:
        """Cuts the window to the fewest last tokens, `CONTEXT` at least, that do in its place.

        Their text must show where it joins the window's: behind a character of which they have
        only the end, if that is where they begin, and with something to be stripped of its space.
        """
        window, end = self._window, settled.end
        text = settled.text + (settled.unsettled if end == len(window) else "")
        num_open = len(text) - self._num_given
        size = CONTEXT
        while size < end:
            tail = self._decode(window[end - size : end])
            num_broken = min(MAX_UNFINISHED, len(tail) - len(tail.lstrip(REPLACEMENT)))
            joined = tail[num_broken:]
            if len(joined) > num_open and text.endswith(joined):
                self._window = window[end - size :]
                self._num_given = len(tail) - num_open
                return
            size = size + 1 if tail else 2 * size


class _StopStrings:
    """Looks for stop strings in text that comes in pieces."""

    def __init__(self, stop: Sequence[str]):
        if isinstance(stop, str):
            raise ValueError(f"stop must be a sequence of strings, got the string {stop!r}")
        for string in stop:
            if not isinstance(string, str) or not string or REPLACEMENT in string:
                raise ValueError(
                    f"a stop string must be text of at least one character, got {string!r}"
                )
        self._strings = tuple(dict.fromkeys(stop))
        self.held = ""  # text that may turn out to be the beginning of a stop string

    def copy(self) -> _StopStrings:
        copy = object.__new__(_StopStrings)
        copy.__dict__.update(self.__dict__)
        return copy

    def push(self, new: str) -> tuple[str, int | None]:
        """The text that is safe with ``new`` behind it, up to a stop string if that completes one.

        Second comes how many characters of ``new`` it took, or None when none is complete.
        """
        text = self.held + new
        found = [
            (begin + len(string), begin)
            for string in self._strings
            if (begin := text.find(string)) >= 0
        ]
        if found:
            end, begin = min(found)
            return text[:begin], end - len(self.held)
        begin = min((_open_from(text, string) for string in self._strings), default=len(text))
        self.held = text[begin:]
        return text[:begin], None


def _open_from(text: str, string: str) -> int:
    """Where the longest end of ``text`` begins with which ``string``, longer than it, begins."""
    begin = text.find(string[0], max(0, len(text) - len(string) + 1))
    while begin >= 0:
        if string.startswith(text[begin:]):
            return begin
        begin = text.find(string[0], begin + 1)
    return len(text)
