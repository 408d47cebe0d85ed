"""Conversations that share system prompts, as benchmarks of serving make them up."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.load.config import LoadConfig

_SYSTEM, _OWN, _GAPS = range(3)  # streams of random numbers


@dataclass(frozen=True)
class Session:
    """Attributes:
    due: seconds after the first that it begins, if they come in time.
    begin: tokens of its system prompt.
    turns: tokens that each turn adds.
    """

    due: float
    begin: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]


def sessions_of(config: LoadConfig, number: int) -> list[Session]:
    """Those of a round: system prompts are the same in all, and all else is new."""

    def tokens(count: int, *stream: int) -> tuple[int, ...]:
        random = np.random.default_rng((config.seed, *stream))
        return tuple(random.integers(0, config.vocabulary, count).tolist())

    random = np.random.default_rng((config.seed, _GAPS, number))
    gaps = random.exponential(1 / (config.rate or 1.0), config.sessions)
    return [
        Session(
            float(due),
            tokens(config.shared_tokens, _SYSTEM, index % config.system_prompts),
            tuple(
                tokens(config.own_tokens, _OWN, number, index, turn) for turn in range(config.turns)
            ),
        )
        for index, due in enumerate(np.cumsum(gaps) - gaps[0])
    ]
