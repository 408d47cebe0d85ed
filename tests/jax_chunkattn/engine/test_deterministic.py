"""An engine whose numbers are the same bits in any company; see also the rule's tests."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from jax_chunkattn import CacheConfig, ChunkSelector, Engine, SamplingParams
from pallas_kernels.implementations import NATIVE
from tests.interpreted import skip_unless_there
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import token_tree, toy_model, windowed_model

PROMPTS = token_tree((1, 70), (3, 20), (2, 9), seed=11)
PARAMS = [
    SamplingParams(
        20, temperature=0.9 * (index % 3), top_p=(1.0, 0.6)[index % 2], seed=index, logprobs=3
    )
    for index in range(len(PROMPTS))
]


pytestmark = pytest.mark.optimised


@pytest.fixture(autouse=True)
def _compiled():
    skip_unless_there(NATIVE)


def engine(**options):
    return make_engine(deterministic=True, planner=None, **options)


def bits(completion):
    """Its tokens, and their log-probabilities and those of the likeliest, to the last bit."""
    reported = [
        (logprobs.chosen, *(value for _, value in logprobs.top)) for logprobs in completion.logprobs
    ]
    return tuple(completion.tokens), np.array(reported, np.float32).tobytes()


def test_drawn_tokens_and_all_that_is_reported_of_them():
    with engine(sharing=False) as alone:
        expected = [
            bits(alone.submit(prompt, params).result())
            for prompt, params in zip(PROMPTS, PARAMS, strict=True)
        ]
    assert len({tokens for tokens, _ in expected}) > 3
    with engine() as shared:
        for order in (range(len(PROMPTS)), reversed(range(len(PROMPTS)))):
            handles = {index: shared.submit(PROMPTS[index], PARAMS[index]) for index in order}
            found = [bits(handles[index].result()) for index in range(len(PROMPTS))]
            assert found == expected
        assert shared.stats.prompts.hit


@pytest.mark.parametrize(
    ("model", "codec", "tolerance"),
    [
        pytest.param(toy_model, "identity", 1e-5, id="exact"),
        pytest.param(windowed_model, "identity", 1e-5, id="windows"),
        pytest.param(toy_model, "int8", 2e-3, id="int8"),
    ],
)
@pytest.mark.slow
def test_it_computes_what_other_engines_do(model, codec, tolerance):
    options = {"model": model(), "codec": codec}
    params = SamplingParams(20, logprobs=0)
    found = []
    for deterministic in (True, False):
        with make_engine(deterministic=deterministic, planner=None, **options) as one:
            answers = [handle.result() for handle in [one.submit(p, params) for p in PROMPTS]]
            found.append([[token.chosen for token in answer.logprobs] for answer in answers])
    # Of int8 a last bit may tip a number over to the next of its codes.
    np.testing.assert_allclose(*found, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_scores():
    prefix, rest = PROMPTS[0][:60], [prompt[60:] for prompt in PROMPTS]
    with engine(sharing=False) as alone:
        expected = [alone.score(prefix, [one])[0] for one in rest]
    with engine() as shared:
        assert shared.score(prefix, rest) == expected
        assert shared.score(prefix, rest[::-1]) == expected[::-1]


def test_its_attention_plan_and_model_must_be_batch_invariant():
    with pytest.raises(ValueError, match="'xla' is not deterministic: 'batch_invariant' is"):
        engine(implementation="xla")
    with pytest.raises(ValueError, match="needs plans in the order of sequences: PlannerOptions"):
        make_engine(deterministic=True)
    selector = ChunkSelector(0.4, recent=0, whole=3)
    with pytest.raises(ValueError, match="what tokens choose to read"):
        engine(selector=selector)

    class Foreign(nnx.Module):
        cache_spec = toy_model().cache_spec
        vocab_size, max_positions = 128, 512

        def __call__(self, tokens, positions, pool, attend):
            raise NotImplementedError

        def logits(self, hidden):
            raise NotImplementedError

    with pytest.raises(ValueError, match="Foreign does not say how to be batch-invariant"):
        Engine(Foreign(), CacheConfig(200, 16), deterministic=True)
