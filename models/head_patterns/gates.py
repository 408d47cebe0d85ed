"""Gates that tell retrieval heads from streaming heads, by optimisation (arXiv 2410.10819, 2.2).

Every KV head has a gate a in [0, 1], and its attention is a times that to all tokens and 1 - a
times that of a streaming head. The model's weights stay as they are. The gates are to be as small
as they can while what the model makes of tokens that it copies stays what it was: the loss is the
mean squared difference of the last hidden states, behind the final norm, and a penalty on the mean
of the gates. Two things differ from the published training: gates are clipped after a step and not
before the next one, and streaming heads see what they will be deployed with.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int32

from jax_chunkattn.device.model_interface import Attend, CacheSpec
from models.decoder import Decoder
from models.dense_attention import (
    attention_scores,
    attention_weights,
    sequence_attend,
    visible_tokens,
    weighted_values,
)
from models.errors import HeadPatternError
from models.head_patterns.pattern import RECENT, SINKS, HeadPattern
from models.saved_state import save_state, saved_state

RATE, PENALTY = 0.02, 0.05
"""The paper's learning rate, and its weight of the mean gate (section 3.1)."""


class GateLoss(NamedTuple):
    """Of one step, before it: the mean squared difference of hidden states, and the mean gate."""

    distance: float
    mean_gate: float


class Gates(nnx.Module):
    """A gate of each KV head of each layer; 1 to begin with, which is the model as it is."""

    def __init__(self, spec: CacheSpec) -> None:
        ones = jnp.ones((spec.num_layers, spec.num_kv_heads), jnp.float32)
        self.values: nnx.Param[Float32[Array, "L Hkv"]] = nnx.Param(ones)


def learning_rate(steps: int, peak: float = RATE) -> optax.Schedule:
    """Of each step: linear up in the first fifth and down in the last, a tenth of the peak at
    least."""
    fifth = max(1, steps // 5)

    def rate(step: ArrayLike) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        rising, falling = (done + 1) / fifth, (steps - done) / fifth
        return peak * jnp.clip(jnp.minimum(rising, falling), 0.1, 1)

    return rate


class GateTraining:
    """Optimises the gates of one model by AdamW without weight decay.

    Where it stands can be saved and taken up again; what follows is then the same.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        steps: int,
        sinks: int = SINKS,
        recent: int = RECENT,
        rate: float = RATE,
        penalty: float = PENALTY,
    ) -> None:
        """For so many `steps` in all.

        Raises:
          HeadPatternError: for sizes that no streaming head has.
        """
        self._sizes = sinks, recent
        self._split = nnx.split(model)
        self._penalty = penalty
        spec = model.cache_spec
        self._gates = Gates(spec)
        adam = optax.adamw(learning_rate(steps, rate), weight_decay=0)
        self._optimizer = nnx.Optimizer(self._gates, adam, wrt=nnx.Param)
        self._streaming = replace(spec, windows=self.pattern.windows(spec, 0))

    @property
    def pattern(self) -> HeadPattern:
        """The gates as they are now, as scores."""
        return HeadPattern.of(np.asarray(self._gates.values[...]), *self._sizes)

    def step(self, tokens: Int32[np.ndarray, " T"], labels: Int32[np.ndarray, " n"]) -> GateLoss:
        """One step on one sequence, of whose tokens `labels` are those that count."""
        gates = nnx.state(self._gates)
        sizes = self._streaming, self._penalty
        loss, gradients = _loss_and_gradients(*self._split, gates, tokens, labels, *sizes)
        with jax.numpy_dtype_promotion("standard"):  # Optax takes a power of a step's number
            self._optimizer.update(self._gates, gradients)
        self._gates.values[...] = jnp.clip(self._gates.values[...], 0, 1)
        return GateLoss(*(float(part) for part in loss))

    def save(self, path: Path) -> None:
        """Everything that the next steps depend on, as arrays."""
        save_state(path, nnx.state((self._gates, self._optimizer)))

    def restore(self, path: Path) -> None:
        """Go on from where another training of the same model and steps was saved.

        Raises:
          HeadPatternError: when the file cannot be read, or is not of such a training.
        """
        trained = self._gates, self._optimizer
        what = "a training of this model's gates"
        nnx.update(
            trained, saved_state(path, nnx.state(trained), what=what, error=HeadPatternError)
        )


@partial(jax.jit, static_argnums=(0, 5, 6))
def _loss_and_gradients(
    graphdef, state, gates, tokens, labels, streaming: CacheSpec, penalty: float
) -> tuple[tuple[jax.Array, jax.Array], nnx.State]:
    """The two parts of the loss, and its gradients by the state of `Gates`."""
    model = nnx.merge(graphdef, state)
    positions = jnp.arange(len(tokens), dtype=jnp.int32)

    def hidden(gates, attend: Attend) -> jax.Array:
        states, _ = model(tokens, positions, gates, attend)
        return model.normed(states[labels]).astype(jnp.float32)

    full = hidden(None, sequence_attend(model.cache_spec))
    attend = _gated_attend(model.cache_spec, streaming)

    def loss(gates) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        [values] = jax.tree.leaves(gates)
        distance = jnp.mean(jnp.square(full - hidden(values, attend)))
        mean_gate = jnp.mean(jnp.abs(values))
        return distance + penalty * mean_gate, (distance, mean_gate)

    gradients, parts = jax.grad(loss, has_aux=True)(gates)
    return parts, gradients


def _gated_attend(spec: CacheSpec, streaming: CacheSpec) -> Attend:
    """The same between what `spec` and `streaming` let heads see, by gates in place of a pool.

    The backward pass computes weights again: those of all layers would not fit into memory.
    """

    @jax.checkpoint
    def attention(gate, layer, q, k, v):
        positions = jnp.arange(len(q), dtype=jnp.int32)
        scores = attention_scores(spec, q, k)
        full, near = (
            attention_weights(scores, visible_tokens(one, layer, positions, len(q)))
            for one in (spec, streaming)
        )
        share = jnp.repeat(gate, q.shape[1] // k.shape[1])[:, None, None]
        return weighted_values(share * full + (1 - share) * near, v).astype(q.dtype)

    def attend(gates, layer, q, k, v):
        return attention(gates[layer], layer, q, k, v), gates

    return attend
