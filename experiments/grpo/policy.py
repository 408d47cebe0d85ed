"""The two ways to sample and to learn: shared, and every sample by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float32, Int32

from experiments.baselines.padded_batch import padded_log_probs
from experiments.grpo import objective, task
from experiments.grpo.config import HEAD_DIM, GrpoConfig
from jax_chunkattn import CacheConfig, Engine, SamplingParams, TokenTree, tree_log_probs
from jax_chunkattn.engine.admission import chunks_to_finish
from jax_chunkattn.sampling.seeds import each_sample
from models import CheckpointError
from models.config import DecoderConfig
from models.decoder import Decoder
from models.saved_state import save_state, saved_state

CHUNK_SIZE = 16
PADDED_AT_ONCE = 64
"""Sequences of the padded batch that are differentiated together."""


@dataclass(frozen=True)
class Rollouts:
    """The samples of a step, B of L tokens, those of a group one after another."""

    prompts: list[list[int]]
    tokens: Int32[np.ndarray, "B L"]
    logprobs: Float32[np.ndarray, "B L"]


class Policy:
    """A decoder that is trained, and an engine that samples by its weights."""

    def __init__(self, config: GrpoConfig, way: str) -> None:
        self._config = config
        self._shared = way == "shared"
        self._model = first_model(config)
        self._first = nnx.state(self._model)
        self._optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.rate))
        self.weights = jax.tree.map(jnp.copy, self._first)
        self.moments = self._optimiser.init(self.weights)
        self._program: Any = None  # compiled by the first batch; all have its sizes
        self._engine = self._make_engine()
        self._engine.warm_up()

    def save(self, path: Path) -> None:
        """What the next steps depend on."""
        save_state(path, (self.weights, self.moments))

    def restore(self, path: Path) -> None:
        """Goes on from where another one was saved.

        Raises:
          CheckpointError: when the file cannot be read, or is not of a training of these sizes.
        """
        state, what = (self.weights, self.moments), "a training of these sizes"
        self.weights, self.moments = saved_state(path, state, what=what, error=CheckpointError)
        self.serve()

    def sample(self, step: int, asked: Sequence[list[int]]) -> Rollouts:
        """The groups of a step's questions."""
        config = self._config
        prompts = [task.prompt_of(config, digits) for digits in asked]
        seeds = np.random.default_rng((config.seed, 2, step)).integers(0, 2**31, len(prompts))
        params = [
            SamplingParams(
                config.digits,
                n=config.samples,
                temperature=1.0,
                seed=int(seed),
                logprobs=0,
                ignore_eos=True,
            )
            for seed in seeds
        ]
        if self._shared:
            groups = self._engine.generate(prompts, params)
            samples = [sample for group in groups for sample in group.samples]
        else:
            handles = [
                self._engine.submit(prompt, own, salt=f"{step} {group} {number}")
                for group, (prompt, one) in enumerate(zip(prompts, params, strict=True))
                for number, own in enumerate(each_sample(one))
            ]
            samples = [handle.result() for handle in handles]
        return Rollouts(
            [prompt for prompt in prompts for _ in range(config.samples)],
            np.array([one.tokens for one in samples], np.int32),
            np.array([[token.chosen for token in one.logprobs] for one in samples], np.float32),
        )

    def learn(self, rollouts: Rollouts, advantages: Float32[np.ndarray, " B"]) -> tuple[int, float]:
        """A step of the optimiser; how many tokens it was of, and what compiling for it took."""
        sequences = [
            [*prompt, *own]
            for prompt, own in zip(rollouts.prompts, rollouts.tokens.tolist(), strict=True)
        ]
        if self._shared:
            begins = [len(prompt) for prompt in rollouts.prompts]
            sizes = {"width": self._config.digits, "min_tokens": self._most_tokens}
            given = TokenTree.of(sequences, begins, **sizes)
            count = int(given.num_tokens)
        else:
            given = np.array(sequences, np.int32)
            count = given.size
        arguments = self.weights, self.moments, self._first, (given, rollouts.logprobs, advantages)
        begin = time.perf_counter()
        if self._program is None:
            self._program = self._compile(arguments)
        seconds = time.perf_counter() - begin
        self.weights, self.moments = jax.block_until_ready(self._program(*arguments))
        return count, seconds

    def serve(self) -> None:
        """Has the engine sample by the weights as they are now."""
        self._engine.update_weights(self.weights)

    def close(self) -> None:
        self._engine.close()

    @property
    def _most_tokens(self) -> int:
        """Of a tree, when no two answers or questions are alike: one program does for all steps."""
        config = self._config
        own = config.digits + 2 + config.samples * config.digits
        return config.instructions + config.prompts * own

    def _compile(self, arguments: tuple[Any, ...]) -> Any:
        step = jax.jit(self._step, donate_argnums=(0, 1))
        with jax.numpy_dtype_promotion("standard"):  # Optax takes a power of a step's number
            return step.lower(*arguments).compile()

    def _step(self, weights: Any, moments: Any, first: Any, batch: Any) -> tuple[Any, Any]:
        given, sampled, advantage = batch
        mask = given.mask if self._shared else jnp.ones(sampled.shape, bool)
        reference = self._log_probs(first, given)
        how = {"clip": self._config.clip, "kl": self._config.kl}

        def loss(weights: Any) -> jax.Array:
            logprobs = self._log_probs(weights, given)
            return objective.loss(logprobs, sampled, reference, advantage, mask, **how)

        updates, moments = self._optimiser.update(jax.grad(loss)(weights), moments, weights)
        return optax.apply_updates(weights, updates), moments

    def _log_probs(self, weights: Any, given: Any) -> jax.Array:
        if self._shared:
            return tree_log_probs(self._model, weights, given)
        how = {"prompt": self._config.prompt_tokens, "at_once": PADDED_AT_ONCE}
        return padded_log_probs(self._model, weights, given, **how)

    def _make_engine(self) -> Engine:
        config = self._config
        rows = config.prompts * config.samples
        each = chunks_to_finish(config.prompt_tokens, config.digits, CHUNK_SIZE)
        cache = CacheConfig(rows * each, CHUNK_SIZE)
        return Engine(self._model, cache, max_running=rows, steps_per_call=config.digits)


def first_model(config: GrpoConfig) -> Decoder:
    """The decoder with random weights."""
    heads = config.hidden // HEAD_DIM
    sizes = DecoderConfig(
        vocab_size=task.VOCABULARY,
        hidden_size=config.hidden,
        intermediate_size=2 * config.hidden,
        num_layers=config.layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=HEAD_DIM,
        max_positions=config.prompt_tokens + config.digits,
        tie_embeddings=True,
    )
    return Decoder(sizes, rngs=nnx.Rngs(config.seed))
