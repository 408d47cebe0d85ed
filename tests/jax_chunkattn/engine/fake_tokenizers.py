"""Tokenizers made of a list of pieces, which decode in the ways that real ones do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby


class ByteTokenizer:
    """Token i is ``pieces[i]``, any bytes; no bytes make a special token, which has no text.

    ``num_decoded`` counts the tokens given to `decode`.
    """

    def __init__(self, pieces: Sequence[bytes]):
        self.pieces = list(pieces)
        self.num_decoded = 0

    def encode(self, text: str) -> list[int]:
        """One token per byte; only for vocabularies that hold them."""
        return [self.pieces.index(bytes([byte])) for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return b"".join(self.pieces[index] for index in ids).decode("utf-8", "replace")


class FirstSpaceTokenizer(ByteTokenizer):
    """Strips one space before the text, as Llama 2's does."""

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).removeprefix(" ")


class AllSpaceTokenizer(ByteTokenizer):
    """Strips all spaces before the text."""

    def decode(self, ids: Sequence[int]) -> str:
        return super().decode(ids).lstrip(" ")


class SingleByteTokenizer(ByteTokenizer):
    """Makes every byte outside a character a U+FFFD of its own, as SentencePiece does."""

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        data = b"".join(self.pieces[index] for index in ids)
        surrogates = data.decode("utf-8", "surrogateescape")
        return "".join("\ufffd" if "\udc80" <= c <= "\udcff" else c for c in surrogates)


class ByteFallbackTokenizer(ByteTokenizer):
    """As `tokenizers` decodes byte fallback: bytes in a row are all valid, or all U+FFFD.

    ``pieces`` of one byte are bytes, the others and a space are text; one space is stripped before
    all.
    """

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        pieces = [self.pieces[index] for index in ids if self.pieces[index]]
        texts = []
        for _, run in groupby(pieces, key=lambda piece: len(piece) == 1 and piece != b" "):
            data = b"".join(run)
            try:
                texts.append(data.decode())
            except UnicodeDecodeError:
                texts.append("\ufffd" * len(data))
        return "".join(texts).removeprefix(" ")
