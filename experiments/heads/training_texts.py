"""Texts that gates are learned from: strings hidden in a text, and copied behind it.

DuoAttention hides ten passkeys of 32 words in a book and asks for them (arXiv 2410.10819, section
2.2); random tokens need no words that ask.
"""

from __future__ import annotations

import numpy as np

from experiments.quality.config import SHOWN, STRING

_FIRST, _LAST = 0.05, 0.95
"""Between these parts of the text strings are hidden."""


def copied_text(
    tokens: np.ndarray, *, length: int, strings: int, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A sequence of `length` tokens, int32, and the places in it that count, int32.

    It is a piece of `tokens`, drawn from all of it, in which strings are hidden, and behind it all
    strings again, in another order. What counts are the tokens from which a copy's next token,
    behind the first `SHOWN`, is to be found.
    """
    size = length - strings * STRING
    begin = random.integers(0, len(tokens) - size + 1)
    text = np.array(tokens[begin : begin + size], np.int32)
    hidden = random.choice(np.unique(tokens), (strings, STRING)).astype(np.int32)
    places = np.arange(int(_FIRST * size), int(_LAST * size) - STRING, STRING)
    for string, place in zip(hidden, random.choice(places, strings, replace=False), strict=True):
        text[place : place + STRING] = string
    copies = random.permutation(hidden)
    within = np.arange(SHOWN - 1, STRING - 1)
    labels = size + np.arange(strings)[:, None] * STRING + within[None]
    return np.concatenate([text, copies.ravel()]), labels.ravel().astype(np.int32)
