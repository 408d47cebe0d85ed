"""Training a learned prefix to stand for a prompt: virtual tokens that make of questions what the
prompt makes of them.

Keys and values themselves are trained, by the divergence of what the model says behind them from
what it says behind the prompt, over answers that it gave there (context distillation, Snell et al.,
arXiv 2209.15189, with the parameters of Cartridges, Eyuboglu et al., arXiv 2506.06266). They begin
as those of the prompt's own first tokens. The model's weights stay as they are.

Letters: L layers, Hkv KV heads, m virtual tokens, D numbers of a head, P tokens of the prompt, B
examples of T tokens, A of them answers, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32

from models.decoder import Decoder
from models.dense_attention import behind_attend, dense_attend, empty_pool
from models.errors import CheckpointError
from models.prefixes import PrefixArrays
from models.saved_state import save_state, saved_state
from models.training import BETAS, Rates

PADDED_TO = 32
"""Tokens: examples are as long as a multiple, so that few programs serve all."""


class Prefix(nnx.Module):
    """The keys and values that are trained."""

    def __init__(self, keys: Float32[Array, "L m Hkv D"], values: Float32[Array, "L m Hkv D"]):
        self.keys = nnx.Param(keys)
        self.values = nnx.Param(values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Examples:
    """Questions with answers, and what the model made of each answer's tokens behind the prompt.

    Attributes:
      tokens: a question and its answer, and padding.
      begins: where the answer begins.
      counts: tokens of the answer.
      expected: hidden states from which the prompt has the answer's tokens chosen.
    """

    tokens: Int32[np.ndarray, "B T"]
    begins: Int32[np.ndarray, " B"]
    counts: Int32[np.ndarray, " B"]
    expected: Float32[np.ndarray, "B A E"]

    def take(self, indices: Sequence[int]) -> Examples:
        """Some of them."""
        return jax.tree.map(lambda array: array[list(indices)], self)


class PrefixTraining:
    """Optimises a prefix by Adam. Where it stands can be saved and taken up again; what follows is
    then the same."""

    def __init__(
        self,
        model: Decoder,
        prompt: Sequence[int],
        num_tokens: int,
        *,
        steps: int,
        warmup: int,
        rate: float,
    ) -> None:
        """For so many `steps` in all, of a prefix of `num_tokens` that is to stand for a prompt.

        Raises:
          ValueError: for a prompt of fewer tokens than the prefix has.
        """
        if not 1 <= num_tokens <= len(prompt):
            raise ValueError(
                f"a prefix of {num_tokens} virtual tokens cannot begin as the first of a prompt of "
                f"{len(prompt)}"
            )
        self._graphdef, self._state = nnx.split(model)
        self._prompt = _read_prompt(self._graphdef, self._state, np.array(prompt, np.int32))
        first = Prefix(*(array[:, :num_tokens] for array in self._prompt))
        self._definition, self._prefix = nnx.split(first)
        self._rates = Rates(steps, warmup, rate)
        self._moments = _adam(self._rates).init(self._prefix)

    @property
    def prefix(self) -> PrefixArrays:
        """As it is now."""
        arrays = nnx.merge(self._definition, self._prefix)
        keys, values = (np.asarray(one[...]) for one in (arrays.keys, arrays.values))
        return PrefixArrays(*(np.array(np.swapaxes(one, 1, 2)) for one in (keys, values)))

    def examples(self, answered: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Examples:
        """Questions with answers of at least one token, as the prompt has them; padded alike."""
        sizes = [(len(question) + len(answer), len(answer)) for question, answer in answered]
        length, most = (-(-max(size) // PADDED_TO) * PADDED_TO for size in zip(*sizes, strict=True))
        tokens = np.zeros((len(answered), length), np.int32)
        for row, (question, answer) in zip(tokens, answered, strict=True):
            row[: len(question) + len(answer)] = *question, *answer
        begins = np.array([len(question) for question, _ in answered], np.int32)
        counts = np.array([len(answer) for _, answer in answered], np.int32)
        expected = [
            _hidden(self._graphdef, self._state, *self._prompt, row, begin, most)
            for row, begin in zip(tokens, begins, strict=True)
        ]
        return Examples(tokens, begins, counts, np.stack(expected))

    def step(self, examples: Examples) -> float:
        """One step; the mean divergence of the answers' tokens before it, in nats."""
        with jax.numpy_dtype_promotion("standard"):  # optax takes a power of a step's number
            loss, self._prefix, self._moments = _step(
                (self._graphdef, self._definition, self._rates),
                self._state,
                self._prefix,
                self._moments,
                examples,
            )
        return float(loss)

    def divergence(self, examples: Examples) -> float:
        """The same of the prefix as it is, and nothing changes."""
        definitions = self._graphdef, self._definition, self._rates
        return float(_mean_divergence(definitions, self._state, self._prefix, examples))

    def save(self, path: Path) -> None:
        """Everything that the next steps depend on, as arrays."""
        save_state(path, (self._prefix, self._moments))

    def restore(self, path: Path) -> None:
        """Go on from where another training of the same model and sizes was saved.

        Raises:
          CheckpointError: when the file cannot be read, or is not of such a training.
        """
        state, what = (self._prefix, self._moments), "a prefix of these sizes"
        self._prefix, self._moments = saved_state(path, state, what=what, error=CheckpointError)


def _adam(rates: Rates) -> optax.GradientTransformation:
    return optax.adam(rates, *BETAS)


@partial(jax.jit, static_argnums=0)
def _read_prompt(
    graphdef: Any, state: Any, tokens: Int32[Array, " P"]
) -> tuple[Float32[Array, "L P Hkv D"], Float32[Array, "L P Hkv D"]]:
    """Keys and values of a prompt."""
    model = nnx.merge(graphdef, state)
    positions, spec = jnp.arange(len(tokens), dtype=jnp.int32), model.cache_spec
    pool = empty_pool(spec, len(tokens))
    _, pool = model(tokens, positions, pool, dense_attend(positions, spec))
    return pool


@partial(jax.jit, static_argnums=(0, 6))
def _hidden(graphdef, state, keys, values, tokens, begin, most):
    return _hidden_of(nnx.merge(graphdef, state), keys, values, tokens, begin, most)


def _hidden_of(model, keys, values, tokens, begin, most) -> Float32[Array, "A E"]:
    """From which the tokens of an answer that begins at `begin` are chosen, the first `most` of
    them, behind given keys and values."""
    positions = keys.shape[1] + jnp.arange(len(tokens), dtype=jnp.int32)
    attend = behind_attend(model.cache_spec, keys, values)
    hidden, _ = model(tokens, positions, None, attend)
    places = begin - 1 + jnp.arange(most, dtype=jnp.int32)
    return jnp.take(hidden, places, axis=0, mode="clip").astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _mean_divergence(definitions, state, prefix, examples) -> Float32[Array, ""]:
    """Of what is said behind a prefix from what is expected: the mean over all answers' tokens."""
    graphdef, definition, _ = definitions
    model, given = nnx.merge(graphdef, state), nnx.merge(definition, prefix)
    most = examples.expected.shape[1]

    def of_one(one: Examples) -> Float32[Array, " A"]:
        where = one.tokens, one.begins, most
        hidden = _hidden_of(model, given.keys[...], given.values[...], *where)
        ours, theirs = (
            jax.nn.log_softmax(model.logits(states.astype(jnp.float32)))
            for states in (hidden, one.expected)
        )
        apart = (jnp.exp(theirs) * (theirs - ours)).sum(axis=-1)
        return jnp.where(jnp.arange(most, dtype=jnp.int32) < one.counts, apart, 0)

    total = examples.counts.sum().astype(jnp.float32)
    return jax.vmap(of_one)(jax.tree.map(jnp.asarray, examples)).sum() / total


@partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def _step(definitions, state, prefix, moments, examples):
    """The mean divergence, and prefix and moments after the step."""

    def loss_of(some):
        return _mean_divergence(definitions, state, some, examples)

    loss, gradients = jax.value_and_grad(loss_of)(prefix)
    updates, moments = _adam(definitions[2]).update(gradients, moments, prefix)
    return loss, optax.apply_updates(prefix, updates), moments
