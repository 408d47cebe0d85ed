"""Training a decoder from scratch, on a machine without a model.

For small models on short sequences: scores of all pairs of tokens are kept for the backward pass.
What is trained is the decoder that is run, with dense attention in place of the chunk pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Float32, Int32

from models.config import DecoderConfig
from models.decoder import Decoder
from models.dense_attention import sequence_attend
from models.errors import CheckpointError
from models.saved_state import save_state, saved_state

LARGEST_GRADIENT = 1.0
"""Longer gradients, all weights together, are cut to this length."""
WEIGHT_DECAY = 0.1
"""Both are GPT-3's (arXiv 2005.14165, appendix B)."""
BETAS = 0.9, 0.99
"""Adam's decay of the mean and the mean square; the second is longer than GPT-3's, as batches are
small."""
LOWEST_RATE = 0.1
"""What the learning rate ends with, as a share of its peak."""


@dataclass(frozen=True)
class Rates:
    """How fast a training learns.

    Attributes:
      steps, warmup: how many steps there are, and in how many of them the rate rises.
      peak: the highest rate.
    """

    steps: int
    warmup: int
    peak: float

    def __call__(self, step: ArrayLike) -> jax.Array:
        """Of a step: linear up to the peak, then half a cosine down to a tenth of it."""
        done = jnp.asarray(step, jnp.float32)
        rising = (done + 1) / max(1, self.warmup)
        share = jnp.clip((done - self.warmup) / max(1, self.steps - self.warmup), 0, 1)
        falling = LOWEST_RATE + (1 - LOWEST_RATE) * (1 + jnp.cos(jnp.pi * share)) / 2
        return self.peak * jnp.where(done < self.warmup, rising, falling)

    def adam(self) -> optax.GradientTransformation:
        """AdamW at these rates; of the weights, matrices decay."""
        return optax.chain(
            optax.clip_by_global_norm(LARGEST_GRADIENT),
            optax.adamw(self, *BETAS, weight_decay=WEIGHT_DECAY, mask=_decaying),
        )


class Training:
    """Optimises a decoder's weights by AdamW, from random ones.

    Matrices decay, norms and biases do not. Where it stands can be saved and taken up again; what
    follows is then the same.
    """

    def __init__(
        self, config: DecoderConfig, *, steps: int, warmup: int, rate: float, seed: int = 0
    ) -> None:
        """For so many `steps` in all.

        What layers add to the residual stream is drawn smaller the more of them there are (Radford
        et al. 2019, section 2.3). Learned positions begin as waves and not at random, so that a
        fixed distance looks alike everywhere. After 200 steps that alone had changed little.
        """
        model = Decoder(config, rngs=nnx.Rngs(seed))
        share = np.float32((2 * config.num_layers) ** -0.5)
        assert not isinstance(model.blocks, nnx.List)
        for added in (model.blocks.attention_out, model.blocks.down):
            added[...] = added[...] * share
        if model.position_embedding is not None:
            waves = position_waves(config.max_positions, config.hidden_size)
            model.position_embedding[...] = jnp.asarray(waves * config.hidden_size**-0.5)
        self._graphdef, self._weights = nnx.split(model)
        self._rates = Rates(steps, warmup, rate)
        self._moments = self._rates.adam().init(self._weights)

    @property
    def model(self) -> Decoder:
        """The decoder with weights of its own, as they are now."""
        return nnx.merge(self._graphdef, jax.tree.map(jnp.copy, self._weights))

    def step(
        self, sequences: Int32[np.ndarray, "B T+1"], begins: Int32[np.ndarray, " B"] | None = None
    ) -> float:
        """One step; the mean loss of all tokens but the first of each sequence before it, in nats.

        Each sequence attends to itself alone; its first token has the position that `begins` says,
        or 0.
        """
        if begins is None:
            begins = np.zeros(len(sequences), np.int32)
        # Optax takes a power of a step's number.
        with jax.numpy_dtype_promotion("standard"):
            loss, self._weights, self._moments = _step(
                self._graphdef, self._rates, self._weights, self._moments, sequences, begins
            )
        return float(loss)

    def losses(self, sequences: Int32[np.ndarray, "B T+1"]) -> Float32[np.ndarray, "B T"]:
        """What the model makes of each token but the first: minus its log-probability, in nats."""
        begins = np.zeros(len(sequences), np.int32)
        return np.asarray(_losses(self._graphdef, self._weights, sequences, begins))

    def save(self, path: Path) -> None:
        """Everything that the next steps depend on, as arrays."""
        save_state(path, (self._weights, self._moments))

    def restore(self, path: Path) -> None:
        """Go on from where another training of the same config and steps was saved.

        Raises:
          CheckpointError: when the file cannot be read, or is not of such a training.
        """
        state, what = (self._weights, self._moments), "a training of these sizes"
        self._weights, self._moments = saved_state(path, state, what=what, error=CheckpointError)


def position_waves(positions: int, hidden: int) -> Float32[np.ndarray, "P E"]:
    """Sines, then cosines, of wavelengths from 2 pi to 10,000 times that (arXiv 1706.03762)."""
    waves = np.arange((hidden + 1) // 2) / max(1, (hidden + 1) // 2 - 1)
    angles = np.arange(positions)[:, None] / 10_000**waves
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :hidden].astype(np.float32)


def _decaying(weights: nnx.State) -> nnx.State:
    """Which weights decay: of the layers' matrices, and the embeddings."""
    kept = ("norm", "bias")

    def decays(path: tuple, leaf: jax.Array) -> bool:
        return not any(word in jax.tree_util.keystr(path) for word in kept)

    return jax.tree_util.tree_map_with_path(decays, weights)


@partial(jax.jit, static_argnums=0)
def _losses(graphdef, weights, sequences, begins):
    """Losses `[B, T]` float32 of sequences `[B, T + 1]` from positions `begins [B]` on."""
    model = nnx.merge(graphdef, weights)
    attend = sequence_attend(model.cache_spec)
    places = jnp.arange(sequences.shape[1] - 1, dtype=jnp.int32)

    def of_one(sequence, begin):
        hidden, _ = model(sequence[:-1], begin + places, None, attend)
        logprobs = jax.nn.log_softmax(model.logits(hidden))
        return -jnp.take_along_axis(logprobs, sequence[1:, None], axis=1)[:, 0]

    return jax.vmap(of_one)(sequences, begins)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3))
def _step(graphdef, rates: Rates, weights, moments, sequences, begins):
    """The mean loss, and weights and moments after the step."""

    def loss_of(some):
        return _losses(graphdef, some, sequences, begins).mean()

    loss, gradients = jax.value_and_grad(loss_of)(weights)
    updates, moments = rates.adam().update(gradients, moments, weights)
    return loss, optax.apply_updates(weights, updates), moments
