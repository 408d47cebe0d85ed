"""A model's own scale and softcap reach attention, in prefill and in decoding."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_chunkattn import CacheConfig, Engine, SamplingParams
from jax_chunkattn.device.model_interface import CacheSpec
from tests import oracle

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
SCALE, SOFTCAP = 1.0, 3.0
SCORES = {"scale": SCALE, "softcap": SOFTCAP}
PROMPT = list(range(36, 1, -1))


class AttentionAlone(nnx.Module):
    """Each token has a query, a key and a value, and the logits are the attention output."""

    def __init__(self):
        self.cache_spec = CacheSpec(1, KV_HEADS, HEAD_DIM, HEADS, softcap=SOFTCAP, scale=SCALE)
        self.vocab_size = HEADS * HEAD_DIM
        self.max_positions = 1000
        random = np.random.default_rng(0)
        self.queries, self.keys, self.values = (
            nnx.Param(
                jnp.asarray(random.standard_normal((self.vocab_size, n, HEAD_DIM), np.float32))
            )
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )

    def __call__(self, tokens, positions, pool, attend):
        q, k, v = (table[...][tokens] for table in (self.queries, self.keys, self.values))
        output, pool = attend(pool, jnp.int32(0), q, k, v)
        return output.reshape(len(tokens), -1), pool

    def logits(self, hidden):
        return hidden


def following(model: AttentionAlone, tokens: list[int], **scores) -> int:
    """The likeliest token after `tokens`, by attention in float64."""
    queries, keys, values = (np.asarray(x[...]) for x in (model.queries, model.keys, model.values))
    k, v = (np.moveaxis(table[tokens], 0, 1) for table in (keys, values))
    return int(oracle.attend(queries[tokens[-1]], k, v, **scores).argmax())


@pytest.mark.slow
def test_the_scale_and_the_softcap_of_a_model_decide_what_it_generates():
    model = AttentionAlone()
    tokens = list(PROMPT)
    for _ in range(8):
        tokens.append(following(model, tokens, **SCORES))
    for ignored in SCORES:
        others = {name: value for name, value in SCORES.items() if name != ignored}
        differ = [
            following(model, tokens[:n], **others) != tokens[n]
            for n in range(len(PROMPT), len(tokens))
        ]
        assert differ[0]  # what prefill chooses
        assert any(differ[1:])
    [output] = Engine(model, CacheConfig(8, 16)).generate([PROMPT], SamplingParams(max_tokens=8))
    assert PROMPT + list(output.samples[0].tokens) == tokens
