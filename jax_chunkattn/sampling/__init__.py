"""Choosing tokens on the device, every row by its own rules and its own seed."""

from jax_chunkattn.sampling.log_probabilities import (
    NO_TOKEN,
    Logprobs,
    TokenLogprobs,
    log_probabilities,
)
from jax_chunkattn.sampling.params import (
    MAX_BIASED_TOKENS,
    MAX_LOGPROBS,
    MAX_STOP_TOKENS,
    SamplingParams,
)
from jax_chunkattn.sampling.rows import MAX_DEFAULT_STOP_TOKENS, RowSampling, TokenCounts
from jax_chunkattn.sampling.sampler import NO_CHOICE, sample
from jax_chunkattn.sampling.seeds import each_sample, fork_seed, sample_seed

__all__ = [
    "MAX_BIASED_TOKENS",
    "MAX_DEFAULT_STOP_TOKENS",
    "MAX_LOGPROBS",
    "MAX_STOP_TOKENS",
    "NO_CHOICE",
    "NO_TOKEN",
    "Logprobs",
    "RowSampling",
    "SamplingParams",
    "TokenCounts",
    "TokenLogprobs",
    "each_sample",
    "fork_seed",
    "log_probabilities",
    "sample",
    "sample_seed",
]
