"""Where the seeds come from of requests that begin as others: samples of a prompt, and forks."""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

from jax_chunkattn.sampling.params import SamplingParams


def each_sample(params: SamplingParams) -> list[SamplingParams]:
    """Of each of the `n` samples: their seeds count up from `seed`, modulo 2**32."""
    return [replace(params, n=1, seed=(params.seed + index) % 2**32) for index in range(params.n)]


def fork_seed(seed: int, number: int) -> int:
    """The seed of a request's fork, `number` others having been made of it before.

    It is the same on every machine: the 4-byte BLAKE2b digest of both numbers as 8 bytes each, all
    little endian. A sum would meet the seeds of samples and of forks of forks; this meets another
    with a chance of one in 2**32.
    """
    key = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=4).digest(), "little")
