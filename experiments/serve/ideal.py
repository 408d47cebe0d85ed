"""What a prefix cache without bound would serve: the bound that hit rates are held to."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class IdealHits:
    """Prompt tokens that some earlier prompt began with.

    Attributes:
      prompt_tokens: of all prompts.
      tokens: shared, up to the last common token.
      tokens_in_chunks: shared in whole chunks.
    """

    prompt_tokens: int
    tokens: int
    tokens_in_chunks: int


def ideal_hits(prompts: Iterable[Sequence[int]], chunk_size: int) -> IdealHits:
    """Hits when every earlier prompt is remembered, and no answer.

    A prompt's last token always counts as missed: it is computed for its logits.
    """
    earlier: list[bytes] = []
    total = tokens = in_chunks = 0
    for prompt in prompts:
        # Big-endian, so that bytes are in the order of the tokens: then the prompt that has most
        # in common with this one is next to it.
        encoded = np.asarray(prompt, ">u4").tobytes()
        place = bisect.bisect_left(earlier, encoded)
        neighbours = earlier[max(0, place - 1) : place + 1]
        earlier.insert(place, encoded)
        common = max((_common_tokens(encoded, other) for other in neighbours), default=0)
        total += len(prompt)
        tokens += min(common, len(prompt) - 1)
        in_chunks += min(common // chunk_size * chunk_size, len(prompt) - 1)
    return IdealHits(total, tokens, in_chunks)


def _common_tokens(one: bytes, other: bytes) -> int:
    length = min(len(one), len(other)) // 4
    differ = np.frombuffer(one, ">u4", length) != np.frombuffer(other, ">u4", length)
    return int(np.argmax(differ)) if differ.any() else length
