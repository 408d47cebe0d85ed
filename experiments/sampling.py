"""The limits of `jax_chunkattn.SamplingParams`, for commands that check options without JAX."""

MOST_TEMPERATURE = 3.4e38
MOST_TOP_K = 2**31 - 1
