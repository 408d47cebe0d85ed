"""What is refused, and why, before a request touches the tree."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jax_chunkattn.allocator import PoolExhausted
from jax_chunkattn.model_interface import DecoderModel
from jax_chunkattn.pool import CacheConfig
from jax_chunkattn.prefix_tree import PrefixTree
from jax_chunkattn.sampling import SamplingParams


class InvalidRequest(ValueError):
    """A request that this session can never serve; nothing has changed."""


def check_request(
    index: int,
    prompt: Sequence[int],
    sampling: SamplingParams,
    model: DecoderModel,
    cache: CacheConfig,
) -> tuple[int, ...]:
    """The prompt as a tuple of ints, checked.

    Raises:
      InvalidRequest: for an empty prompt, something that is not a token id of the model, or more
        tokens than the model has positions.
      PoolExhausted: when the whole pool could not hold the request.
    """
    if len(prompt) == 0:
        raise InvalidRequest(f"prompt {index} is empty: it needs at least one token")
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidRequest(f"prompt {index} must be a sequence of token ids, got {prompt!r:.60}")
    outside = (ids < 0) | (ids >= model.vocab_size)
    if outside.any():
        where = int(np.argmax(outside))
        raise InvalidRequest(
            f"prompt {index} has token id {ids[where]} at position {where}; "
            f"the model's ids go from 0 to {model.vocab_size - 1}"
        )
    total = len(ids) + sampling.max_tokens
    if total > model.max_positions:
        raise InvalidRequest(
            f"prompt {index} has {len(ids)} tokens and asks for {sampling.max_tokens} more; "
            f"the model has {model.max_positions} positions"
        )
    needed = chunks_to_finish(len(ids), sampling.max_tokens, cache.chunk_size)
    if needed > cache.num_chunks:
        raise PoolExhausted(
            f"prompt {index} needs {needed} chunks of {cache.chunk_size} tokens to finish; "
            f"the pool has {cache.num_chunks} in all"
        )
    return tuple(ids.tolist())


def chunks_to_finish(prompt_tokens: int, max_tokens: int, chunk_size: int) -> int:
    """Chunks a request holds at its end; the last token's keys and values are never needed."""
    return -(-(prompt_tokens + max_tokens - 1) // chunk_size)


def chunks_needed(
    prompts: Sequence[Sequence[int]], max_tokens: int, *, chunk_size: int, sharing: bool = True
) -> int:
    """The smallest pool, in chunks, that decodes these prompts together to the end."""
    total = sum(chunks_to_finish(len(prompt), max_tokens, chunk_size) for prompt in prompts)
    if not sharing:
        return total
    tree = PrefixTree(total, chunk_size)
    return total - sum(tree.insert(prompt).num_cached_tokens // chunk_size for prompt in prompts)
