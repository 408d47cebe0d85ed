"""Sampling parameters and token counts as arrays, with a row for each row of a batch or slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jax_chunkattn.sampling.params import MAX_BIASED_TOKENS, MAX_STOP_TOKENS, SamplingParams
from pallas_kernels.plans import HostOrDevice

MAX_DEFAULT_STOP_TOKENS = 16
NO_BIAS = 2**31 - 1  # in place of a token: beyond every vocabulary, so that its bias is dropped
NO_STOP = -1  # in place of a token: equal to none
LOGPROBS_OFF = -1

_GREEDY = SamplingParams()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowSampling:
    """The sampling parameters of every row of a batch, or of every slot of a table.

    Letters: B rows (or slots), M = `MAX_BIASED_TOKENS`, E = `MAX_STOP_TOKENS +
    MAX_DEFAULT_STOP_TOKENS`.
    """

    temperature: Float32[HostOrDevice, " B"]
    top_k: Int32[HostOrDevice, " B"]
    top_p: Float32[HostOrDevice, " B"]
    min_p: Float32[HostOrDevice, " B"]
    seed: UInt32[HostOrDevice, " B"]
    repetition_penalty: Float32[HostOrDevice, " B"]
    presence_penalty: Float32[HostOrDevice, " B"]
    frequency_penalty: Float32[HostOrDevice, " B"]
    bias_tokens: Int32[HostOrDevice, "B M"]  # all different, then NO_BIAS
    bias_values: Float32[HostOrDevice, "B M"]
    stop_tokens: Int32[HostOrDevice, "B E"]  # then NO_STOP
    logprobs: Int32[HostOrDevice, " B"]  # how many likeliest tokens; LOGPROBS_OFF for no report

    @classmethod
    def stack(
        cls, params: Sequence[SamplingParams], rows: int, stop_tokens: Sequence[int] = ()
    ) -> RowSampling:
        """Parameters of each row, as NumPy arrays, padded to `rows` with greedy ones.

        Args:
          params: of the first rows.
          rows: B.
          stop_tokens: the engine's own, which end every row that does not ignore them; padding too.

        Raises:
          ValueError: for more parameters than rows, more than `MAX_DEFAULT_STOP_TOKENS` stop
            tokens, or a row that draws its tokens and has no seed.
        """
        if len(params) > rows:
            raise ValueError(f"{len(params)} sampling parameters do not fit {rows} rows")
        if len(stop_tokens) > MAX_DEFAULT_STOP_TOKENS:
            raise ValueError(
                f"an engine has at most {MAX_DEFAULT_STOP_TOKENS} stop tokens, "
                f"got {len(stop_tokens)}"
            )
        if any(one.seed is None and one.temperature for one in params):
            raise ValueError("a row with a temperature needs a seed")
        padded = [*params, *[_GREEDY] * (rows - len(params))]
        stops = np.full((rows, MAX_STOP_TOKENS + MAX_DEFAULT_STOP_TOKENS), NO_STOP, np.int32)
        stops[:, MAX_STOP_TOKENS : MAX_STOP_TOKENS + len(stop_tokens)] = stop_tokens
        bias_tokens = np.full((rows, MAX_BIASED_TOKENS), NO_BIAS, np.int32)
        bias_values = np.zeros((rows, MAX_BIASED_TOKENS), np.float32)
        for row, one in enumerate(params):
            if one.ignore_eos:
                stops[row] = NO_STOP
            if one.stop_token_ids:
                stops[row, : len(one.stop_token_ids)] = one.stop_token_ids
            if one.logit_bias:
                count = len(one.logit_bias)
                bias_tokens[row, :count] = np.fromiter(one.logit_bias.keys(), np.int32, count)
                bias_values[row, :count] = np.fromiter(one.logit_bias.values(), np.float32, count)
        return cls(
            temperature=np.array([p.temperature for p in padded], np.float32),
            top_k=np.array([p.top_k for p in padded], np.int32),
            top_p=np.array([p.top_p for p in padded], np.float32),
            min_p=np.array([p.min_p for p in padded], np.float32),
            seed=np.array([p.seed or 0 for p in padded], np.uint32),
            repetition_penalty=np.array([p.repetition_penalty for p in padded], np.float32),
            presence_penalty=np.array([p.presence_penalty for p in padded], np.float32),
            frequency_penalty=np.array([p.frequency_penalty for p in padded], np.float32),
            bias_tokens=bias_tokens,
            bias_values=bias_values,
            stop_tokens=stops,
            logprobs=np.array(
                [LOGPROBS_OFF if p.logprobs is None else p.logprobs for p in padded], np.int32
            ),
        )

    def take(self, slots: Int32[Array, " R"]) -> RowSampling:
        """The rows of these slots; a slot below 0 or from B up gives a greedy row that never stops.

        That is a row of `stack([], 1)`.
        """
        greedy = RowSampling.stack([], 1)
        return jax.tree.map(lambda values, fill: _take(values, slots, fill.flat[0]), self, greedy)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenCounts:
    """Which tokens each slot, or row, has seen. Letters: S slots, V tokens of the vocabulary."""

    prompt: Bool[Array, "S V"]  # occurs in the prompt
    generated: Int32[Array, "S V"]  # how often it was generated

    def take(self, slots: Int32[Array, " B"]) -> TokenCounts:
        """The rows of these slots; a slot below 0 or from S up has seen nothing."""
        return TokenCounts(_take(self.prompt, slots, False), _take(self.generated, slots, 0))


def _take(values, slots, fill):
    """Rows of `values`, or of `fill` where there is no such row."""
    return (
        jnp.asarray(values).at[slots].get(mode="fill", fill_value=fill, wrap_negative_indices=False)
    )
