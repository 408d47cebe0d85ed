"""`python -m experiments decode`: how fast a batch decodes, with the prefix shared and without.

Each study varies one thing, and times both sides in turns at every value: tokens per second over
the completion's length (ChunkAttention, arXiv 2402.15220, Figure 3), the batch (its Figure 4), the
shared prefix's length (Hydragen, arXiv 2402.05099), the chunk's size, and the steps of one call to
the device. The side `shared` holds and reads the shared tokens once; `unshared` has a copy of them
for every row.

Decoding alone is timed: the compiled decode loop with plans made beforehand, without compilation,
prefill and the engine's host work (which `engine` measures). The keys and values of the prompts are
random numbers, the same on both sides, since a step takes as long whatever they are: prefill of 32
prompts of 16,384 tokens would take hours. So both sides choose the same tokens, up to rounding,
which is counted. A point that would not fit is skipped, and the reason told.

Besides, a few real prompts (the beginning of the system prompt that ships with this, and questions;
random tokens for a model without a tokenizer) are answered by the engine on both sides, with their
prefill, to see that the tokens are the same.

The default model, `random:small`, has the shape of a small Llama: 15 million parameters, 4 layers
of 8 query and 4 KV heads of 64, 32,768 positions, 8 KiB of float32 KV cache a token. Two cores
decode 32 rows of it at hundreds of tokens a second, and 32 copies of 16,384 tokens fit into 4.3 GB.
Attention's part is larger than in a large model: over 3,600 tokens it takes as many operations as
the products with the weights, in Llama 2 7B over 26,000. `--model smollm2` is a real one: 45 KiB a
token, 8,192 positions. A study takes some minutes.

    python -m experiments decode
    python -m experiments decode --study shared --rounds 5
    python -m experiments decode --study batch --model smollm2 --points 4 8 16
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from experiments.decode.points import points_of
from experiments.harness.commands import Experiment
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
from experiments.harness.results import open_results
from experiments.loading import parse_model

Side = Literal["shared", "unshared"]


@dataclass(frozen=True)
class DecodeConfig:
    """Time decoding over the completion, the batch, the shared prefix, the chunk or the call."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "points": (16, 32),
        "max_positions": 1024,
        "rows": 8,
        "own_tokens": 8,
        "chunk_size": 16,
        "tokens": 32,
        "rounds": 2,
        "check_tokens": 8,
    }

    study: Literal["completion", "batch", "shared", "chunk-size", "steps"] = "completion"
    """What is varied."""

    points: Annotated[tuple[int, ...] | None, by_default("INT ...", "those of the study")] = None
    """Values of what is varied."""

    sides: tuple[Side, ...] = ("shared", "unshared")
    """What is timed, in turns."""

    model: ModelName = "random:small"

    shared_tokens: Annotated[
        tuple[int, ...] | None,
        by_default(
            "INT ...", "1024 2048 4096 for completion, else 2048; halved to fit max-positions"
        ),
    ] = None
    """Tokens that all prompts begin with; several make as many series. The study `shared` takes
    `points` instead."""

    rows: int = 32
    """Rows decoded at once, unless the study varies them."""

    own_tokens: int = 16
    """Tokens of each prompt behind the shared ones."""

    tokens: int = 32
    """Tokens decoded for each row, unless the study varies them."""

    chunk_size: int = 64
    """Tokens in a chunk of the KV cache, unless the study varies them."""

    steps_per_call: int = 8
    """Tokens decoded for each row in one call to the device, unless the study varies them."""

    rounds: int = 3
    """How often each side is timed, in turns; the medians are reported."""

    check_tokens: int = 16
    """Tokens of the answers to real prompts that are compared; 0 leaves the comparison out."""

    memory_gb: float = 8.0
    """Gigabytes (10^9 bytes) that the keys and values of a point may take, both sides together."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of weights, activations and KV cache."""

    implementation: AttentionImplementation = None

    max_positions: MaxPositions = None

    seed: int = 0
    """Seed of keys and values, and of random weights and prompts."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/decode-TIME")] = None
    """Folder for the results: `results.jsonl` has every time that was taken."""


def run(config: DecodeConfig) -> dict[str, Any]:
    """Run the study, print its tables, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("decode", config) as folder:
        from experiments.decode.run import measure

        return measure(config, source, folder)


def check(config: DecodeConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    names = ("rows", "own_tokens", "tokens", "chunk_size", "steps_per_call", "rounds")
    check_at_least_one(config, *names, "max_positions")
    if config.study != "shared":
        check_at_least_one(config, "points")
    check_above_zero(config, "memory_gb")
    check_seed(config.seed)
    _check_from_zero("--points", config.points)
    _check_from_zero("--shared-tokens", config.shared_tokens)
    _check_from_zero("--check-tokens", (config.check_tokens,))
    if not config.sides or len(set(config.sides)) < len(config.sides):
        named = " ".join(config.sides) or "none"
        raise UserError(f"--sides must name one side or both, each once, got {named}")
    if config.study == "shared" and config.shared_tokens is not None:
        raise UserError(
            "--study shared varies the shared tokens: give them as --points, not --shared-tokens"
        )
    for name, point in points_of(config).items():
        for count in point.completions:
            if count % point.steps_per_call:
                raise UserError(
                    f"{name}: {count} tokens are no multiple of {point.steps_per_call} steps a "
                    "call; choose others by --tokens, --points or --steps-per-call"
                )


def _check_from_zero(option: str, values: tuple[int, ...] | None) -> None:
    if values is None:
        return
    if not values or min(values) < 0 or len(set(values)) < len(values):
        given = " ".join(map(str, values)) or "nothing"
        raise UserError(f"{option} must be different numbers from 0 up, got {given}")


def headline(summary: dict[str, Any]) -> dict[str, float | str | None]:
    """The numbers of a run that a sweep shows, those of its last point."""
    return {
        "tokens/s, shared": summary["shared_tokens_per_second"],
        "tokens/s, unshared": summary["unshared_tokens_per_second"],
        "times as fast": summary["ratio"],
    }


DECODE = Experiment("decode", DecodeConfig, run, check, headline)
