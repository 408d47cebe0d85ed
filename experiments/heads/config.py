"""The options of `heads`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_above_zero,
    check_at_least_one,
    check_seed,
)
from experiments.quality.config import STRING, check_copies, copies_room

Chooser = Literal["scored", "learned", "random"]


@dataclass(frozen=True)
class HeadsConfig:
    """Find the KV heads that must keep all tokens, write patterns that `--heads` takes, and show
    what the model loses when the other heads see the first tokens and the last alone."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "patterns": ("scored", "learned", "random"),
        "sinks": 8,
        "recent": 32,
        "length": 192,
        "strings": 1,
        "steps": 3,
        "save_every": 2,
        "learn_length": 128,
        "learn_strings": 1,
        "shares": (0.5,),
        "random_patterns": 1,
        "prefix": 64,
        "window": 12,
        "windows": 2,
        "copy_lengths": (192,),
        "copy_strings": 1,
        "chunk_size": 16,
    }

    model: ModelName = "smollm2"

    patterns: tuple[Chooser, ...] = ("scored", "random")
    """What chooses the heads: scores of one forward pass, gates that are optimised (DuoAttention;
    it takes long), or chance."""

    sinks: int = 64
    """Of the first tokens, those that a streaming head sees."""

    recent: int = 256
    """Of the last tokens, those that a streaming head sees."""

    text: Annotated[Path | None, by_default("FILE", "Python's own help")] = None
    """UTF-8 text; patterns are found in its second half, and measured in its first."""

    length: int = 4096
    """For scores: tokens of the text with hidden strings, as many as are to be remembered."""

    strings: int = 10
    """For scores: strings hidden at each of three depths."""

    steps: int = 24
    """For gates: steps of the optimiser."""

    learn_length: int = 640
    """For gates: tokens of a sequence, with the copies of strings behind it."""

    learn_strings: int = 3
    """For gates: strings that are hidden in a sequence."""

    rate: float = 0.06
    """For gates: the learning rate; with the paper's 2,000 steps 0.02."""

    penalty: float = 0.05
    """For gates: what the mean gate weighs in the loss."""

    save_every: int = 3
    """For gates: steps after which they are saved, to go on from."""

    shares: tuple[float, ...] = (0.75, 0.5, 0.25)
    """Shares of the heads that keep all tokens; none: patterns are only written."""

    random_patterns: int = 1
    """How many patterns are drawn by chance."""

    prefix: int = 512
    """Tokens that all windows have before them; whole chunks."""

    window: int = 512
    """Tokens of a window of text; all are scored."""

    windows: int = 4
    """Windows, one after another in the text."""

    copy_lengths: tuple[int, ...] = (2048, 4096)
    """Tokens of the texts that strings are hidden in, and to be copied from."""

    copy_strings: int = 5
    """Strings hidden at each of three depths."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    implementation: AttentionImplementation = None

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights, activations and KV cache."""

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of strings, random patterns and random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/heads-TIME")] = None
    """Folder for the results, and for the patterns: a folder each."""


def check(config: HeadsConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(
        config,
        "recent",
        "length",
        "strings",
        "steps",
        "learn_length",
        "learn_strings",
        "save_every",
        "random_patterns",
        "prefix",
        "window",
        "windows",
        "copy_lengths",
        "copy_strings",
        "chunk_size",
        "max_positions",
    )
    check_above_zero(config, "rate", "penalty")
    if config.sinks < 0:
        raise UserError(f"--sinks must be 0 or more, got {config.sinks}")
    if not config.patterns or len(set(config.patterns)) < len(config.patterns):
        given = " ".join(config.patterns) or "none"
        raise UserError(f"--patterns must name one or more, each once, got {given}")
    shares = config.shares
    if len(set(shares)) < len(shares) or not all(0 <= share < 1 for share in shares):
        raise UserError(
            "--shares must be from 0 to below 1, each once; all heads are measured anyway; got "
            f"{' '.join(map(str, shares))}"
        )
    if config.prefix % config.chunk_size:
        raise UserError(
            f"--prefix must be a multiple of --chunk-size {config.chunk_size}, got {config.prefix}"
        )
    check_copies(config.copy_lengths, config.copy_strings, config.chunk_size)
    least = copies_room(config.strings)
    if config.length < least:
        raise UserError(
            f"--length must be {least:,} tokens at least to hide {config.strings} strings at each "
            f"depth (--strings), got {config.length}"
        )
    if config.learn_length < 4 * config.learn_strings * STRING:
        raise UserError(
            f"--learn-length must be {4 * config.learn_strings * STRING:,} tokens at least to hide "
            f"--learn-strings {config.learn_strings}, got {config.learn_length}"
        )
    check_seed(config.seed)
