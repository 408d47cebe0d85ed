"""`python -m experiments quality`: what sharing a prefix does to a model's predictions: nothing.

A text is cut into a prefix and windows, and every window is read behind the prefix, as questions
are behind one system prompt. The log-probability of each token of the windows is computed three
ways: by a plain causal forward pass over the prefix and the window, with dense attention and no
cache; by prefill of the windows behind a prefix that is in the chunk pool once; and by decoding all
windows together, a token a step, fed as the text has it, in two-phase attention over that pool.

Shown are the perplexity of each, how far log-probabilities are apart, and how often both find the
same token likeliest. In float32 only the order of sums differs. In half precision every way rounds
differently, so each is also held against the plain pass in float32.

The text is the system prompt that ships with the project with its questions behind it, 2,326 tokens
of SmolLM2; or any other in a file. It takes 7 minutes on two cores, most of them for the plain
passes. A model without a tokenizer reads the bytes of the text.

    python -m experiments quality
    python -m experiments quality --text book.txt --dtypes float32 --windows 64
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.harness.commands import Experiment
from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.harness.results import open_results
from experiments.loading import parse_model

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class QualityConfig:
    """Compare a model's perplexity through the shared cache with that of a plain forward pass."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "dtypes": ("float32",),
        "prefix": 64,
        "window": 12,
        "windows": 8,
        "chunk_size": 16,
        "prefill_tokens": 32,
    }

    model: ModelName = "smollm2"

    text: Annotated[
        Path | None, by_default("FILE", "the system prompt and questions that ship with this")
    ] = None
    """UTF-8 text to score."""

    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
    """Types of weights, activations and KV cache, one after another."""

    prefix: int = 1024
    """Tokens that all windows have before them; whole chunks."""

    window: int = 64
    """Tokens of a window; all are scored."""

    windows: int = 16
    """Windows, one after another in the text; they are decoded together."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache."""

    prefill_tokens: Literal[32, 128, 512] = 512
    """Most tokens that one call of prefill computes."""

    implementation: AttentionImplementation = None

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of random weights."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/quality-TIME")] = None
    """Folder for the results: `results.jsonl` has every log-probability."""


def run(config: QualityConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("quality", config) as folder:
        from experiments.quality.run import measure

        return measure(config, source, folder)


def check(config: QualityConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    check_at_least_one(config, "prefix", "window", "windows", "chunk_size", "max_positions")
    if not config.dtypes or len(set(config.dtypes)) < len(config.dtypes):
        given = " ".join(config.dtypes)
        raise UserError(f"--dtypes must name one type or more, each once, got {given or 'none'}")
    if config.prefix % config.chunk_size:
        raise UserError(
            f"--prefix must be a multiple of --chunk-size {config.chunk_size}, of which only whole "
            f"ones are shared, got {config.prefix}"
        )
    check_seed(config.seed)


def headline(summary: dict[str, Any]) -> dict[str, float | str | None]:
    """The numbers of a run that a sweep shows, those of its first type."""
    first = summary["dtypes"][0]
    decode = first["paths"]["decode"]
    return {
        "perplexity, plain": first["paths"]["plain"]["perplexity"],
        "perplexity, shared": decode["perplexity"],
        "largest difference of log-probabilities": decode["largest_difference"],
        "same likeliest token": decode["greedy_agreement"],
    }


QUALITY = Experiment("quality", QualityConfig, run, check, headline)
