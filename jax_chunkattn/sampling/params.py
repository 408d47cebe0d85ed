"""What one request asks of sampling, checked when it is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, KeysView, Mapping, Sequence, ValuesView
from dataclasses import KW_ONLY, dataclass, field
from math import nextafter
from numbers import Integral, Real
from typing import Any

import numpy as np

MAX_BIASED_TOKENS = 256
MAX_STOP_TOKENS = 16
MAX_LOGPROBS = 20

_MAX_INT32 = 2**31 - 1
_MAX_TOKEN = _MAX_INT32 - 1  # the id above it is padding on the device

# Smallest and largest value, and how an error names them.
_Range = tuple[float, float, str]
_INTEGERS: dict[str, _Range] = {
    "max_tokens": (1, _MAX_INT32, f"from 1 to {_MAX_INT32}"),
    "top_k": (0, _MAX_INT32, f"from 0 (off) to {_MAX_INT32}"),
    "n": (1, _MAX_INT32, f"from 1 to {_MAX_INT32}"),
}
_NUMBERS: dict[str, _Range] = {
    "temperature": (0, 3.4e38, "from 0 (greedy) to 3.4e38"),
    "top_p": (nextafter(0, 1), 1, "above 0 and at most 1 (off)"),
    "min_p": (0, 1, "from 0 (off) to 1"),
    "repetition_penalty": (0.01, 100, "from 0.01 to 100, 1 being off"),
    "presence_penalty": (-2, 2, "from -2 to 2, 0 being off"),
    "frequency_penalty": (-2, 2, "from -2 to 2, 0 being off"),
}
_TOKEN: _Range = (0, _MAX_TOKEN, f"from 0 to {_MAX_TOKEN}")
_BIAS: _Range = (-100, 100, "from -100 to 100")
_SEED: _Range = (0, 2**32 - 1, f"from 0 to {2**32 - 1}")
_LOGPROBS: _Range = (0, MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}, or None (off)")


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen, and when it ends.

    The logits pass through `logit_bias`, the repetition penalty, and the frequency and presence
    penalties; the likeliest token is then the greedy choice. With a temperature, a token is drawn
    from what temperature, top-k, top-p and min-p leave, in this order.

    Attributes:
      max_tokens: most tokens to generate.
      temperature: divides the logits; 0 (or less than 1e-30) takes the likeliest token.
      top_k: keeps the k likeliest tokens (and ties with the last of them); 0 keeps all.
      top_p: then keeps the smallest set of likeliest tokens with at least this probability (and
        ties with the last of them).
      seed: random numbers depend on this and on the position only, never on the batch. None draws
        a fresh one for each request; `Completion.seed` tells which. Sample 0 of `n` has the seed
        itself, the others and forks have hashes of it: see `jax_chunkattn.sampling.seeds`.
      min_p: then keeps tokens at least `min_p` times as likely as the likeliest (Nguyen et al.,
        arXiv 2407.01082).
      repetition_penalty: divides the positive logits, and multiplies the negative ones, of tokens
        that occur in the prompt or were generated (CTRL: Keskar et al., arXiv 1909.05858, section
        4.1, which has no case for negative ones).
      presence_penalty: taken from the logit of each token that was generated.
      frequency_penalty: taken from a token's logit as often as it was generated.
      logit_bias: added to the logits of these tokens.
      stop: strings before which the text ends; a single one may be given as it is.
      stop_token_ids: tokens after which generation ends, besides the engine's own.
      ignore_eos: the engine's own stop tokens do not end generation.
      logprobs: the log-probability of each chosen token is reported, and those of this many
        likeliest tokens (of all, if the vocabulary has fewer), in the model's own distribution:
        before all of the above. None is off.
      n: answers to generate.

    Raises:
      ValueError: for a value of another type or outside its range.
    """

    max_tokens: int = 48
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    _: KW_ONLY
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self):
        checked: dict[str, Any] = {
            name: _integer(name, getattr(self, name), limits) for name, limits in _INTEGERS.items()
        }
        for name, limits in _NUMBERS.items():
            checked[name] = _number(name, getattr(self, name), limits)
        checked["logit_bias"] = _biases(self.logit_bias)
        checked["stop"] = _stop_strings(self.stop)
        checked["stop_token_ids"] = checked_stop_tokens(
            "stop_token_ids", self.stop_token_ids, MAX_STOP_TOKENS
        )
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        checked["ignore_eos"] = bool(self.ignore_eos)
        if self.seed is not None:
            checked["seed"] = _integer("seed", self.seed, _SEED)
        if self.logprobs is not None:
            checked["logprobs"] = _integer("logprobs", self.logprobs, _LOGPROBS)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens of the prompt, or those generated so far, change the logits."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def for_one_answer(self, seed: int) -> SamplingParams:
        """These with `n` 1 and this seed; all else is as it was checked."""
        if (self.n, self.seed) == (1, seed):
            return self
        one = object.__new__(SamplingParams)
        vars(one).update(vars(self), n=1, seed=seed)
        return one

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError when a token named here is not one of V = `vocab_size`."""
        named = {"logit_bias": self.logit_bias, "stop_token_ids": self.stop_token_ids}
        for name, tokens in named.items():
            require_in_vocabulary(name, tokens, vocab_size)


class ReadOnlyBiases(Mapping[int, float]):
    """Biases by token, as checked; unlike a mappingproxy they hash, copy and pickle."""

    def __init__(self, biases: Mapping[int, float]):
        self._biases = dict(biases)

    def __getitem__(self, token: int) -> float:
        return self._biases[token]

    def __iter__(self) -> Iterator[int]:
        return iter(self._biases)

    def __len__(self) -> int:
        return len(self._biases)

    def keys(self) -> KeysView[int]:  # the dict's own views are ten times as fast as Mapping's
        return self._biases.keys()

    def values(self) -> ValuesView[float]:
        return self._biases.values()

    def __hash__(self) -> int:
        return hash(frozenset(self._biases.items()))

    def __repr__(self) -> str:
        return repr(self._biases)


def _integer(name: str, value: Any, limits: _Range) -> int:
    low, high, expected = limits
    if not _between(value, Integral, low, high):
        raise ValueError(f"{name} must be an integer {expected}, got {value!r}")
    return int(value)


def _number(name: str, value: Any, limits: _Range) -> float:
    low, high, expected = limits
    if not _between(value, Real, low, high):
        raise ValueError(f"{name} must be a number {expected}, got {value!r}")
    return float(value)


def _between(value: Any, kind: type[Any], low: float, high: float) -> bool:
    """Whether it is a number of this kind in this range: bools are no numbers, NaN is in none."""
    return isinstance(value, kind) and not isinstance(value, bool) and bool(low <= value <= high)


def _biases(biases: Any) -> ReadOnlyBiases:
    if isinstance(biases, ReadOnlyBiases):
        return biases
    if not isinstance(biases, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {biases!r:.60}")
    if len(biases) > MAX_BIASED_TOKENS:
        raise ValueError(
            f"logit_bias must name at most {MAX_BIASED_TOKENS} tokens, got {len(biases)}"
        )
    checked = {}
    for token, bias in biases.items():
        token = _integer("each token id of logit_bias", token, _TOKEN)
        checked[token] = _number(f"logit_bias of token {token}", bias, _BIAS)
    return ReadOnlyBiases(checked)


def _stop_strings(stop: Any) -> tuple[str, ...]:
    if isinstance(stop, str):
        stop = (stop,)
    if not isinstance(stop, Iterable):
        raise ValueError(f"stop must be a string or several, got {stop!r:.60}")
    strings = tuple(stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be strings that are not empty, got {string!r:.60}")
    return strings


def checked_stop_tokens(name: str, tokens: Any, most: int) -> tuple[int, ...]:
    """At most `most` token ids as ints; raises ValueError, in which `name` stands for them."""
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise ValueError(f"{name} must be a sequence of token ids, got {tokens!r:.60}")
    checked = tuple(_integer(f"each of {name}", token, _TOKEN) for token in tokens)
    if len(checked) > most:
        raise ValueError(f"{name} must be at most {most} tokens, got {len(checked)}")
    return checked


def require_in_vocabulary(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Raises ValueError when one of the `tokens`, from 0 up, is not one of V = `vocab_size`."""
    largest = max(tokens, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f"{name} names token {largest}; the model's ids go from 0 to {vocab_size - 1}"
        )
