"""The options of `search`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from experiments.codecs import CodecName, check_used_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    MaxPositions,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads
from experiments.sampling import MOST_TEMPERATURE


@dataclass(frozen=True)
class SearchConfig:
    """Search a tree of answers to one question: fork the best, drop the rest, share all they have
    in common."""

    SMOKE: ClassVar[dict[str, Any]] = {"width": 2, "keep": 1, "depth": 2, "tokens": 4}

    question: str = "What makes a good friend?"
    """What is asked."""

    model: str = "smollm2"
    """`smollm2` (downloaded once), a GGUF file, a folder with a Hugging Face checkpoint, or
    ORG/NAME[@REVISION] to fetch from the hub."""

    system_prompt: Annotated[Path | None, by_default("FILE", "the shipped one")] = None
    """A text file with the system prompt."""

    width: int = 3
    """Branches of each partial answer."""

    keep: int = 2
    """Partial answers that go on at each depth: those of the highest mean log-probability."""

    depth: int = 4
    """Rounds of branching."""

    tokens: int = 12
    """Tokens that a branch adds, two or more."""

    temperature: float = 0.8
    """Randomness of the branches."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    codec: CodecName = "identity"

    heads: HeadsFolder = None

    head_share: HeadShare = None

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of the branches."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/search-TIME")] = None
    """Folder for the results."""


def check(config: SearchConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "width", "keep", "depth", "chunk_size", "max_positions")
    if config.tokens < 2:
        raise UserError(
            f"--tokens must be at least 2, got {config.tokens}: a first branch begins with one "
            "that it is given"
        )
    if config.width > 20:
        raise UserError(f"--width must be at most 20, got {config.width}")
    if not 0 < config.temperature <= MOST_TEMPERATURE:
        raise UserError(
            f"--temperature must be a number above 0, at most {MOST_TEMPERATURE}, "
            f"got {config.temperature}"
        )
    check_used_codec(config.codec)
    check_heads(config)
    check_seed(config.seed)
    if not config.question.strip():
        raise UserError("--question is empty")
