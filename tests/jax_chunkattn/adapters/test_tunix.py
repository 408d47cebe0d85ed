"""The engine in the hands of the real tunix: `pip install google-tunix`, then `-m slow`.

Its code survives neither warnings as errors nor strict promotion, which are off for it; it works in
threads of its own, so for all threads.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jax_chunkattn import CacheConfig
from jax_chunkattn.adapters.tunix import RolloutOutput, TunixRollout, rollout_engine
from jax_chunkattn.adapters.tunix_sampler import SamplerOutput, TunixSampler
from models.adapters.tunix import TrainableDecoder
from tests.jax_chunkattn.adapters.byte_ids import ByteIds
from tests.jax_chunkattn.engine.engines import SHARE_ALL, BytePairs, make_engine
from tests.jax_chunkattn.toy import toy_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tunix") is None,
        reason="google-tunix is not installed: pip install -e '.[test,tunix]'",
    ),
]

STEPS, GROUP, TOKENS = 6, 8, 8
PROMPTS = ["Say something in plain ASCII: ", "And now: "]


@pytest.fixture
def tunix() -> Iterator[Any]:
    """Imports a module of tunix by its name, and lets it be as it is."""
    settings = {"jax_numpy_rank_promotion": "allow", "jax_numpy_dtype_promotion": "standard"}
    before = {name: getattr(jax.config, name) for name in settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in settings.items():
            jax.config.update(name, value)
        try:
            yield lambda name: importlib.import_module(f"tunix.{name}")
        finally:
            for name, value in before.items():
                jax.config.update(name, value)


def own_copy(model: Any) -> Any:
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jnp.copy, state))


def share_of_ascii(text: str) -> float:
    return sum(map(str.isascii, text)) / max(1, len(text))


@pytest.mark.parametrize("options", [{}, {"echo": True}, {"pad_output": True}])
def test_answers_are_those_of_its_own_sampler(tunix, options):
    sampler = tunix("generate.sampler")
    spec = toy_model().cache_spec
    cache = sampler.CacheConfig(128, spec.num_layers, spec.num_kv_heads, spec.head_dim)
    own = sampler.Sampler(TrainableDecoder(toy_model()), ByteIds(), cache)
    texts = ["The quick brown", "fox", "jumps over the lazy"]
    asked = {
        "max_generation_steps": 12,
        "max_prompt_length": 32,
        "return_logprobs": True,
        **options,
    }
    expected, found = own(texts, **asked), TunixSampler(make_engine(), ByteIds())(texts, **asked)
    assert found.text == expected.text
    assert [list(one) for one in found.tokens] == [list(one) for one in expected.tokens]
    np.testing.assert_array_equal(found.padded_prompt_tokens, expected.padded_prompt_tokens)
    assert found.logprobs is not None
    for mine, its in zip(found.logprobs, expected.logprobs, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)


def make_engine_of_rollouts() -> Any:
    """With the engine of `make_engine`, whose programs are compiled once."""
    cache = CacheConfig(200, 16)
    return rollout_engine(cache, planner=SHARE_ALL, max_running=16, steps_per_call=3)


def make_learner(tunix, reward) -> Any:
    """A GRPO learner of the toy model, with a reference that it must not leave behind."""
    cluster, grpo = tunix("rl.rl_cluster"), tunix("rl.grpo.grpo_learner")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    roles = cluster.Role.ACTOR, cluster.Role.REFERENCE, cluster.Role.ROLLOUT
    config = cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine=make_engine_of_rollouts(),
        training_config=cluster.RLTrainingConfig(
            actor_optimizer=optax.adam(3e-3),
            eval_every_n_steps=1000,
            max_steps=1000,
            mini_batch_size=len(PROMPTS),
            train_micro_batch_size=len(PROMPTS),
        ),
        rollout_config=tunix("rl.rollout.base_rollout").RolloutConfig(
            max_tokens_to_generate=TOKENS, max_prompt_length=32, temperature=1.0, seed=3
        ),
    )
    its = cluster.RLCluster(
        actor=TrainableDecoder(own_copy(toy_model())),
        reference=TrainableDecoder(own_copy(toy_model())),
        tokenizer=ByteIds(),
        cluster_config=config,
    )
    algorithm = grpo.GRPOConfig(num_generations=GROUP, num_iterations=2, beta=0.01)
    return grpo.GRPOLearner(rl_cluster=its, reward_fns=reward, algo_config=algorithm)


def test_its_grpo_learner_takes_steps_with_our_rollout(tunix):
    rewards, versions = [], []

    def reward(prompts, completions, **_):
        """Asked when a step's answers are there; holds them to an engine made of the actor."""
        cluster = learner.rl_cluster
        versions.append(cluster.rollout.engine.stats.weights_version)
        fresh = make_engine(model=own_copy(cluster.actor_trainer.model.decoder))
        again = TunixSampler(fresh, ByteIds())(prompts, TOKENS, temperature=1.0, seed=3)
        assert completions == again.text
        rewards.append(list(map(share_of_ascii, completions)))
        return rewards[-1]

    learner = make_learner(tunix, reward)
    rollout = learner.rl_cluster.rollout
    assert isinstance(rollout, TunixRollout)
    assert learner.should_sync_weights
    learner.train([{"prompts": np.array(PROMPTS)} for _ in range(STEPS)])

    assert versions == list(range(STEPS))
    means = [float(np.mean(one)) for one in rewards]
    assert len(rewards[0]) == len(PROMPTS) * GROUP
    assert means[-1] > means[0] + 0.1, means
    trained = learner.rl_cluster.actor_trainer.model
    served = nnx.to_pure_dict(nnx.state(rollout.model()))
    pairs = [jax.tree.leaves(one) for one in (served, nnx.to_pure_dict(nnx.state(trained)))]
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_array_equal(one, other)
    [output] = rollout.engine.generate([list(PROMPTS[0].encode())])
    assert output.samples[0].weights == (STEPS,)
    assert rollout.engine.stats.scored_tokens > 0


def test_log_probabilities_are_those_of_its_own_rollout(tunix):
    common, base = tunix("rl.common"), tunix("rl.rollout.base_rollout")
    actor = TrainableDecoder(toy_model())
    rollout = make_engine_of_rollouts()(rollout_actor=actor, tokenizer=ByteIds())
    output = rollout.generate(
        PROMPTS, base.RolloutConfig(max_tokens_to_generate=6, temperature=0.0)
    )
    completions = np.zeros((len(PROMPTS), TOKENS), np.int32)
    for row, tokens in zip(completions, output.tokens, strict=True):
        row[: len(tokens)] = tokens
    graphdef, state = nnx.split(actor)
    ids = {"pad_id": rollout.pad_id(), "eos_id": rollout.eos_id()}
    prompts = jnp.asarray(output.left_padded_prompt_tokens)
    expected = common.compute_per_token_logps(
        graphdef, state, prompt_tokens=prompts, completion_tokens=jnp.asarray(completions), **ids
    )
    found = rollout.get_per_token_logps(prompts, jnp.asarray(completions))
    real = completions != rollout.pad_id()
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(expected)[real], atol=1e-5)


def test_our_outputs_have_the_fields_of_its_own(tunix):
    base, sampler = tunix("rl.rollout.base_rollout"), tunix("generate.base_sampler")
    pairs = (base.RolloutOutput, RolloutOutput), (sampler.SamplerOutput, SamplerOutput)
    for its, own in pairs:
        assert list(its.__dataclass_fields__) == list(own.__dataclass_fields__)
    assert set(dir(TunixRollout)) >= base.BaseRollout.__abstractmethods__
    assert set(dir(TunixSampler)) >= sampler.BaseSampler.__abstractmethods__


def test_the_readme_s_lines_run(tunix):
    from tests.test_readme import EXAMPLES

    [example] = [each for each in EXAMPLES if "tunix" in each]
    tokenizer = SimpleNamespace(eos_id=10, encode=BytePairs().encode, decode=BytePairs().decode)
    loaded = SimpleNamespace(model=toy_model(), tokenizer=tokenizer)
    made = {"CacheConfig": CacheConfig, "loaded": loaded}
    exec(compile(example.replace("1GiB", "4MiB"), "README.md", "exec"), made)
    rollout = made["rollouts"](rollout_actor=made["actor"], tokenizer=made["tokenizer"])
    assert isinstance(rollout, tunix("rl.rollout.base_rollout").BaseRollout)
    assert tunix("generate.tokenizer_adapter").TokenizerAdapter(made["tokenizer"]).eos_id() == 10
