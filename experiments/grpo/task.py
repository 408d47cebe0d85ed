"""Questions with one right answer each, and what an answer is worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64

from experiments.grpo.config import GrpoConfig

VOCABULARY = 16
QUESTION, ANSWER = 10, 11
"""Signs before a question and before its answer; below them are the digits."""

ANSWERS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": list,
    "reverse": lambda digits: digits[::-1],
    "sort": sorted,
}


def questions(config: GrpoConfig, step: int) -> list[list[int]]:
    """The digits of a step's questions."""
    random = np.random.default_rng((config.seed, 1, step))
    return random.integers(0, 10, (config.prompts, config.digits)).tolist()


def instructions(config: GrpoConfig) -> list[int]:
    """What all questions stand behind. It says nothing: the reward has to."""
    random = np.random.default_rng((config.seed, 0))
    return random.integers(0, VOCABULARY, config.instructions).tolist()


def prompt_of(config: GrpoConfig, digits: Sequence[int]) -> list[int]:
    """The tokens of a question."""
    return [*instructions(config), QUESTION, *digits, ANSWER]


def rewards(
    config: GrpoConfig, asked: Sequence[list[int]], answers: Sequence[Sequence[Sequence[int]]]
) -> Float64[np.ndarray, "prompts samples"]:
    """The share of each answer's digits that are right."""
    right = np.array([ANSWERS[config.task](digits) for digits in asked])[:, None]
    return (np.array(answers) == right).mean(axis=2)
