"""Where seeds come from that nobody has given: of samples, of forks, and of chance.

A seed made of another and a number is the same on every machine: the 4-byte BLAKE2b digest of both
as 8 bytes each, little endian, personalised by what it is for. A sum would not do: samples of seed
1 would repeat those of seed 0, and forks meet them. Two of these meet with a chance of one in
2**32.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from secrets import randbits

from jax_chunkattn.sampling.params import SamplingParams


def each_sample(params: SamplingParams) -> Sequence[SamplingParams]:
    """Of each of the `n` samples; a seed is drawn if there is none.

    The first has the seed itself, as if it were the only one, and the others `sample_seed` of it.
    """
    seed = randbits(32) if params.seed is None else params.seed
    return [
        params.for_one_answer(sample_seed(seed, index) if index else seed)
        for index in range(params.n)
    ]


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index`, from 1 up, of a request with this seed."""
    return _digest(seed, index, b"sample")


def fork_seed(seed: int, number: int) -> int:
    """The seed of a request's fork, `number` others having been made of it before."""
    return _digest(seed, number, b"")


def _digest(seed: int, number: int, purpose: bytes) -> int:
    key = seed.to_bytes(8, "little") + number.to_bytes(8, "little")
    return int.from_bytes(blake2b(key, digest_size=4, person=purpose).digest(), "little")
