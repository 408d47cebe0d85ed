"""An engine as tunix's rollout worker and as its sampler.

Held to google-tunix 0.1.7: its GRPO learner takes steps with `rollout_engine`, and greedy tokens
and log-probabilities are those of its own sampler. Importing this needs no tunix; its classes are
met by their methods and fields.

tunix asks for several samples of a prompt by repeating it. The prefix tree finds by itself whole
chunks that are the same, in one call or in several; a prompt that is repeated in a row is one
request with as many samples, so that its last, partly filled chunk is computed once too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_chunkattn.adapters.padded import without_left_padding, without_right_padding
from jax_chunkattn.adapters.tunix_sampler import Tokenizer, TunixSampler, refuse
from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.weights import named_leaves
from jax_chunkattn.engine.engine import Engine


@dataclass
class RolloutOutput:
    """The fields of tunix's class of this name; as `SamplerOutput`."""

    text: list[str]
    logits: None
    tokens: list[np.ndarray] | np.ndarray
    left_padded_prompt_tokens: np.ndarray
    logprobs: list[np.ndarray] | None


class TunixRollout:
    """A rollout worker: an engine with weights of its own, which the trainer's replace.

    tunix makes it where `ClusterConfig.rollout_engine` is `rollout_engine(...)`.

    Args:
      rollout_actor: what is trained: a `jax_chunkattn.DecoderModel`, or a module that has one as
        its `decoder`, such as `models.adapters.tunix.TrainableDecoder`. Its weights are copied, so
        that a trainer may donate them.
      tokenizer: of tunix.
      mesh: the engine's arrays lie as the model's do; this is not needed.
      rollout_config: `data_type` is that of the engine's weights; None keeps the model's.
      cache: of the engine.
      engine_options: what else `Engine` takes.

    Raises:
      ValueError: for a model without a decoder, one with LoRA, or a mapping of weights: names and
        shapes have to be the decoder's own.
    """

    def __init__(
        self,
        *,
        rollout_actor: Any,
        tokenizer: Tokenizer,
        mesh: Any = None,
        rollout_config: Any = None,
        cache: CacheConfig,
        **engine_options: Any,
    ):
        from flax import nnx

        mapping = getattr(rollout_config, "rollout_mapping_config", None)
        lora = jax.tree.leaves(nnx.state(rollout_actor, nnx.LoRAParam))
        inner = hasattr(rollout_actor, "decoder")
        served = rollout_actor.decoder if inner else rollout_actor
        refuse(
            rollout_actor=not hasattr(served, "cache_spec")
            and f"{type(served).__name__} is no jax_chunkattn.DecoderModel, and has no decoder",
            lora=bool(lora) and _NO_LORA,
            rollout_mapping_config=mapping is not None and "weights are taken by their own names",
        )
        dtype = getattr(rollout_config, "data_type", None)
        graphdef, state = nnx.split(served)
        copies = jax.tree.map(lambda value: jnp.array(value, dtype or value.dtype), state)
        engine = Engine(nnx.merge(graphdef, copies), cache, **engine_options)
        self._inner = "decoder" if inner else None
        self._definition = nnx.graphdef(rollout_actor)
        self._names = list(named_leaves(nnx.state(rollout_actor)))
        self._structure = jax.tree.structure(nnx.state(rollout_actor))
        self._sampler = TunixSampler(engine, tokenizer)

    @property
    def engine(self) -> Engine:
        return self._sampler.engine

    def generate(self, prompts: list[str], rollout_config: Any, **kwargs: Any) -> RolloutOutput:
        """An answer to each prompt, as tunix's `RolloutConfig` says.

        Its fields for other engines, and `kv_cache_size`, mean nothing here. Raises what
        `TunixSampler` raises, and TypeError for more arguments.
        """
        if kwargs:
            raise TypeError(f"TunixRollout.generate knows no {', '.join(sorted(kwargs))}")
        output = self._sampler(
            prompts,
            rollout_config.max_tokens_to_generate,
            rollout_config.max_prompt_length,
            rollout_config.temperature,
            rollout_config.top_p,
            rollout_config.top_k,
            seed=rollout_config.seed,
            eos_tokens=rollout_config.eos_tokens,
            return_logprobs=rollout_config.return_logprobs,
        )
        return RolloutOutput(
            output.text,
            None,
            output.tokens,
            output.padded_prompt_tokens,
            None
            if output.logprobs is None
            else [np.array(row, np.float32) for row in output.logprobs],
        )

    def get_per_token_logps(self, prompt_tokens: Any, completion_tokens: Any) -> jax.Array:
        """Log-probabilities of completions `[B, T]`, padded on the right, behind prompts `[B, P]`,
        padded on the left: `[B, T]` float32, 0 for padding. By the weights that are served, and
        not divided by a temperature, as tunix's own rollout has them. The token of padding counts
        as padding at the ends of a row alone. Raises InvalidRequest for a prompt without tokens."""
        pad_id = self.pad_id()
        prompts, completions = np.asarray(prompt_tokens), np.asarray(completion_tokens)
        scored = np.zeros(completions.shape, np.float32)
        queries = [
            (without_left_padding(prompt, pad_id), without_right_padding(answer, pad_id))
            for prompt, answer in zip(prompts, completions, strict=True)
        ]
        rows = [row for row, (_, answer) in enumerate(queries) if len(answer)]
        scores = self.engine.score_batch(
            [(queries[row][0].tolist(), [queries[row][1].tolist()]) for row in rows]
        )
        for row, [score] in zip(rows, scores, strict=True):
            scored[row, : len(score.tokens)] = [one.chosen for one in score.logprobs]
        return jnp.asarray(scored)

    def update_params(self, params: Any, filter_types: Any = None) -> None:
        """Serves the trainer's weights from now on; they are copied.

        Raises:
          ValueError: for LoRA's, which are no weights of the decoder's.
          InvalidWeights: when they do not fit; the old ones are served.
        """
        from flax import nnx

        kinds = filter_types if isinstance(filter_types, tuple) else (filter_types,)
        refuse(lora=nnx.LoRAParam in kinds and _NO_LORA)
        # The caller forbids transfers to and from the host, which a new pool needs.
        with jax.transfer_guard("allow"):
            self.engine.update_weights(params if self._inner is None else params[self._inner])

    def pad_id(self) -> int:
        return self._sampler.tokenizer.pad_id()

    def eos_id(self) -> int:
        return self._sampler.tokenizer.eos_id()

    def model(self) -> Any:
        """A model like the trainer's, with the weights that are served now, not copied."""
        from flax import nnx

        weights, prefix = self.engine.weights, f"{self._inner}." if self._inner else ""
        leaves = [weights[name.removeprefix(prefix)] for name in self._names]
        return nnx.merge(self._definition, jax.tree.unflatten(self._structure, leaves))


_NO_LORA = "the engine serves whole weights: merge LoRA's into them"


def rollout_engine(cache: CacheConfig, **engine_options: Any) -> partial[TunixRollout]:
    """What `ClusterConfig.rollout_engine` of tunix takes; the arguments are those of `Engine`.

    This imports tunix, which takes no class but those that it knows as rollouts.
    """
    from tunix.rl.rollout.base_rollout import (  # pyright: ignore[reportMissingImports]
        BaseRollout,
    )

    BaseRollout.register(TunixRollout)
    return partial(TunixRollout, cache=cache, **engine_options)
