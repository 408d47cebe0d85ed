"""An engine behind tunix's interfaces. Without tunix, to which `test_tunix.py` holds it."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_chunkattn import CacheConfig, InvalidWeights, SamplingParams
from jax_chunkattn.adapters.padded import distinct_seeds, padded_prompts, runs
from jax_chunkattn.adapters.tunix import TunixRollout
from jax_chunkattn.adapters.tunix_sampler import TunixSampler
from jax_chunkattn.sampling.seeds import each_sample
from models.adapters.tunix import TrainableDecoder
from tests.jax_chunkattn.adapters.byte_ids import ByteIds
from tests.jax_chunkattn.engine.engines import SHARE_ALL, make_engine
from tests.jax_chunkattn.toy import (
    greedy_without_cache,
    log_probabilities_without_cache,
    reweighted,
    toy_model,
)

TEXTS = ["The quick brown", "fox", "jumps over the lazy"]
CONFIG = {
    "max_tokens_to_generate": 8,
    "max_prompt_length": 24,
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": None,
    "seed": None,
    "eos_tokens": None,
    "return_logprobs": False,
}


def config(**fields) -> SimpleNamespace:
    """The fields of tunix's `RolloutConfig` that count."""
    return SimpleNamespace(**CONFIG | fields)


def make_rollout(actor=None, **options) -> TunixRollout:
    """With the engine of `make_engine`, whose programs are compiled once."""
    return TunixRollout(
        rollout_actor=actor or TrainableDecoder(toy_model()),
        tokenizer=ByteIds(),
        cache=CacheConfig(200, 16),
        **{"planner": SHARE_ALL, "max_running": 16, "steps_per_call": 3, **options},
    )


def make_sampler() -> TunixSampler:
    return TunixSampler(make_engine(), ByteIds())


def test_answers_are_those_of_the_model_and_have_their_log_probabilities():
    output = make_sampler()(TEXTS, 8, 24, return_logprobs=True)
    assert output.logprobs is not None
    for text, prompt, tokens, logprobs, said in zip(
        TEXTS,
        output.padded_prompt_tokens,
        output.tokens,
        output.logprobs,
        output.text,
        strict=True,
    ):
        ids = list(text.encode())
        assert prompt.tolist() == [0] * (24 - len(ids)) + ids
        assert tokens.tolist() == greedy_without_cache(ids, 8)
        expected = log_probabilities_without_cache(tuple(ids))[tokens[0]]
        assert logprobs[0] == pytest.approx(expected, abs=2e-5)
        assert len(logprobs) == len(tokens)
        assert said == ByteIds().decode(tokens.tolist())


def test_a_token_that_ends_an_answer_is_no_part_of_it():
    ids = list(TEXTS[0].encode())
    answer = greedy_without_cache(ids, 8)
    output = make_sampler()(TEXTS[0], 8, eos_tokens=[answer[6]], return_logprobs=True)
    assert output.logprobs is not None
    assert output.tokens[0].tolist() == answer[:6]
    assert len(output.logprobs[0]) == 6


def test_an_answer_can_have_its_prompt_before_it_and_padding_behind_it():
    ids = list(TEXTS[1].encode())
    answer = greedy_without_cache(ids, 8)
    output = make_sampler()(
        TEXTS[1],
        12,
        8,
        echo=True,
        pad_output=True,
        eos_tokens=[answer[5]],
        return_logprobs=True,
    )
    assert output.logprobs is not None
    [tokens], [logprobs] = output.tokens, output.logprobs
    assert tokens.tolist() == [*ids, *answer[:5], *[0] * 12]
    assert [bool(one) for one in logprobs] == [False] * 3 + [True] * 5 + [False] * 12
    assert output.text == [ByteIds().decode([*ids, *answer[:5]])]


def test_a_prompt_that_is_repeated_is_computed_once():
    sampler = make_sampler()
    texts = [TEXTS[0]] * 4 + [TEXTS[2]] * 3
    output = sampler(texts, 8, temperature=1.0, seed=7)
    last = 3 + 2  # the other samples are drawn from what follows the prompt's last token
    assert sampler.engine.stats.prefill_tokens == len(TEXTS[0]) + len(TEXTS[2]) + last
    assert len({bytes(tokens) for tokens in output.tokens}) == 7
    again = make_sampler()(texts, 8, temperature=1.0, seed=7)
    assert list(map(list, again.tokens)) == list(map(list, output.tokens))


def test_rows_are_repeated_where_they_stand():
    a, b = [1], [2]
    assert runs([a, a, b, a], 9) == [(a, 2), (b, 1), (a, 1)]
    assert runs([a, a, a], 2) == [(a, 2), (a, 1)]
    assert runs([], 2) == []


def test_seeds_are_made_of_whatever_stands_for_one():
    numbers = distinct_seeds(5, 3)
    assert len({5, *numbers}) == len(numbers)
    for number in (5 + 2**32, np.int32(5), np.uint32(5), jnp.int32(5)):
        assert distinct_seeds(number, 3) == numbers
    keys = distinct_seeds(jax.random.key(5), 3)
    assert distinct_seeds(jax.random.PRNGKey(5), 3) == keys
    assert len({*keys, *numbers, *distinct_seeds(jax.random.key(6), 3)}) == 9
    assert distinct_seeds(None, 2) == [None, None]
    for one in keys:
        SamplingParams(seed=one)


def test_no_run_draws_as_a_sample_of_another_does():
    first, *others = distinct_seeds(5, 4)
    samples = [one.seed for one in each_sample(SamplingParams(n=4, seed=first))]
    assert not set(others) & set(samples)


def test_prompts_are_padded_to_a_power_of_two_where_the_width_does_not_do():
    for width, expected in [(None, 4), (2, 4), (3, 3), (8, 8)]:
        assert padded_prompts([[1, 2, 3], [4]], width, 0).shape == (2, expected)
    assert padded_prompts([[1] * 4], None, 0).shape == (1, 4)
    assert padded_prompts([[1]], None, 0).shape == (1, 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("return_logits", {"return_logits": True}),
        ("beam_size", {"beam_size": 2}),
        ("multi_sampling", {"multi_sampling": 2}),
        ("forbidden_tokens", {"forbidden_tokens": [3]}),
        ("images", {"images": []}),
        ("return_logprobs", {"return_logprobs": True, "temperature": 0.7}),
    ],
)
def test_what_an_engine_does_not_do_is_refused_by_name(name, options):
    with pytest.raises(ValueError, match=f"{name} is not supported"):
        make_sampler()(TEXTS, 8, **options)


def test_a_rollout_scores_what_it_answers():
    rollout = make_rollout()
    output = rollout.generate([TEXTS[0], TEXTS[1]], config(return_logprobs=True))
    assert output.logprobs is not None
    completions = np.zeros((2, 10), np.int32)
    completions[:, :8] = output.tokens
    scored = rollout.get_per_token_logps(output.left_padded_prompt_tokens, jnp.array(completions))
    np.testing.assert_allclose(scored[:, :8], np.stack(output.logprobs), atol=2e-5)
    assert not np.asarray(scored[:, 8:]).any()
    nothing = rollout.get_per_token_logps(output.left_padded_prompt_tokens, np.zeros((2, 3)))
    assert not np.asarray(nothing).any()
    assert rollout.pad_id() == 0
    assert rollout.eos_id() == 10


def test_a_rollout_serves_the_weights_that_a_trainer_gives_it():
    rollout = make_rollout()
    prompt = list(TEXTS[0].encode())
    new = reweighted(toy_model())
    given = nnx.state(TrainableDecoder(new), nnx.Param)
    with jax.transfer_guard("disallow_explicit"):
        rollout.update_params(given, (nnx.Param,))
    [tokens] = rollout.generate(TEXTS[:1], config()).tokens
    assert tokens.tolist() == greedy_without_cache(prompt, 8, model=new)
    [output] = rollout.engine.generate([prompt])
    assert output.samples[0].weights == (1,)
    for served, expected in zip(
        jax.tree.leaves(nnx.state(rollout.model())), jax.tree.leaves(given), strict=True
    ):
        np.testing.assert_array_equal(served, expected)
        assert served is not expected


def test_a_trainer_may_donate_the_weights_that_a_rollout_began_with():
    graphdef, state = nnx.split(TrainableDecoder(toy_model()))
    actor = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
    rollout = make_rollout(actor)
    for leaf in jax.tree.leaves(nnx.state(actor)):
        leaf.delete()
    [tokens] = rollout.generate(TEXTS[:1], config()).tokens
    assert tokens.tolist() == greedy_without_cache(list(TEXTS[0].encode()), 8)


def test_a_rollout_may_be_of_a_decoder_itself():
    rollout = make_rollout(toy_model())
    rollout.update_params(nnx.state(reweighted(toy_model())))
    assert set(rollout.engine.weights) == set(make_engine().weights)
    assert type(rollout.model()) is type(toy_model())


def test_a_rollout_refuses_what_it_cannot_serve():
    with pytest.raises(ValueError, match="no jax_chunkattn"):
        make_rollout(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="rollout_mapping_config"):
        make_rollout(rollout_config=config(rollout_mapping_config=object()))
    rollout = make_rollout()
    with pytest.raises(ValueError, match="LoRA"):
        rollout.update_params({}, (nnx.LoRAParam,))
    with pytest.raises(InvalidWeights):
        rollout.update_params({"decoder": {}}, (nnx.Param,))
    with pytest.raises(TypeError, match="best_of"):
        rollout.generate(TEXTS, config(), best_of=2)
