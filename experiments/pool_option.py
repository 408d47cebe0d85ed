"""The option `--pool-memory`: how large the KV pool is."""

from __future__ import annotations

from typing import Any

from experiments.harness.errors import UserError
from jax_chunkattn import CacheConfig, CacheSpec
from pallas_kernels.codecs import CodecError


def pool_within(memory: str, spec: CacheSpec, rows: int, **options: Any) -> tuple[CacheConfig, int]:
    """A pool of so much memory, and how many chunks of a model fit into it, beside the last chunks
    of so many rows where those are kept apart. `options` are others of `CacheConfig`.

    Raises:
        UserError: a size that is none, or too small for a chunk.
        CodecError: chunks that the codec cannot store.
    """
    try:
        cache = CacheConfig(memory=memory, **options)
        return cache, cache.chunks_for(spec, rows)
    except CodecError:
        raise
    except ValueError as error:
        raise UserError(f"--pool-memory {memory}: {error}") from error
