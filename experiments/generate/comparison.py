"""How many requests the run without sharing can take on."""

from __future__ import annotations

from collections.abc import Sequence

PREFILL_SECONDS = 30.0
"""How long the prefill of the run without sharing may take when its batch is not given."""

FREE_MEMORY_FRACTION = 0.5
"""How much of the free memory its KV cache may take then."""


def affordable_batch(
    prompt_lengths: Sequence[int],
    *,
    max_tokens: int,
    tokens_per_second: float,
    bytes_per_token: float,
    free_bytes: int | None,
    seconds: float = PREFILL_SECONDS,
) -> int:
    """The largest leading part of a batch that can be run without sharing; at least one request.

    Args:
        prompt_lengths: tokens of each request's prompt; all of them are computed.
        max_tokens: tokens each request may add.
        tokens_per_second: prompt tokens computed a second, as measured on this machine.
        bytes_per_token: KV cache of one token.
        free_bytes: memory that can be taken, or None when it is not known.
        seconds: the most that prefill may take.
    """
    batch = 0
    tokens = 0
    for length in prompt_lengths:
        tokens += length
        held = (tokens + (batch + 1) * max_tokens) * bytes_per_token
        too_long = tokens > seconds * tokens_per_second
        too_large = free_bytes is not None and held > FREE_MEMORY_FRACTION * free_bytes
        if too_long or too_large:
            break
        batch += 1
    return max(1, batch)
