"""The options of `quality`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from experiments.codecs import CODECS, check_codec
from experiments.harness.errors import UserError
from experiments.harness.options import (
    AttentionImplementation,
    MaxPositions,
    ModelName,
    by_default,
    check_at_least_one,
    check_seed,
)
from experiments.head_option import HeadsFolder, HeadShare, check_heads
from experiments.select_option import CHOICES, DenseLayers, check_choices, check_dense_layers

Dtype = Literal["float32", "bfloat16", "float16"]

STRING, SHOWN = 32, 8
"""Tokens of a hidden string, and how many of them a window begins with."""
DEPTHS = (10, 50, 90)
"""Where strings are hidden, in percent of the text."""


@dataclass(frozen=True)
class QualityConfig:
    """Compare a model's predictions through the shared cache with those of a plain forward pass, or
    over encoded chunks with those over chunks as they are."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "model": "random:tiny",
        "dtypes": ("float32",),
        "prefix": 64,
        "window": 12,
        "windows": 8,
        "chunk_size": 16,
        "prefill_tokens": 32,
        "answers": 4,
        "answer_tokens": 8,
        "copy_lengths": (192,),
        "copy_strings": 1,
    }

    model: ModelName = "smollm2"

    codec: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar=f"[{CODECS} ...]", help_behavior_hint="(optional)")
    ] = ()
    """Compare these codecs of the KV cache with chunks that are stored as they are."""

    select: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar=CHOICES, help_behavior_hint="(optional)")
    ] = ()
    """Compare queries that read this share of the chunks before them, chosen by this policy, with
    those that read all."""

    dense_layers: DenseLayers = None

    heads: HeadsFolder = None

    head_share: HeadShare = None

    text: Annotated[
        Path | None,
        by_default(
            "FILE",
            "the system prompt and questions that ship with this; with --codec Python's own help",
        ),
    ] = None
    """UTF-8 text to score."""

    dtypes: Annotated[
        tuple[Dtype, ...] | None,
        by_default(
            "{float32,bfloat16,float16} ...", "float32 bfloat16 float16; with --codec float32"
        ),
    ] = None
    """Types of weights, activations and KV cache, one after another."""

    prefix: Annotated[int | None, by_default("INT", "1024; with --codec 512")] = None
    """Tokens that all windows have before them; whole chunks."""

    window: Annotated[int | None, by_default("INT", "64; with --codec 512")] = None
    """Tokens of a window; all are scored."""

    windows: Annotated[int | None, by_default("INT", "16; with --codec 4")] = None
    """Windows, one after another in the text; they are decoded together."""

    answers: int = 32
    """With --codec: pieces of the text, of a chunk at most, that the model goes on after, each
    behind the prefix."""

    answer_tokens: int = 64
    """With --codec: how far it goes on, greedily."""

    copy_lengths: tuple[int, ...] = (2048, 4096)
    """With --codec: tokens of the texts that strings are hidden in, and to be copied from."""

    copy_strings: int = 5
    """With --codec: strings hidden at each of three depths."""

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


@dataclass(frozen=True)
class Sizes:
    """What `QualityConfig` leaves to what is measured."""

    dtypes: tuple[Dtype, ...]
    prefix: int
    window: int
    windows: int


_SIZES = Sizes(("float32", "bfloat16", "float16"), prefix=1024, window=64, windows=16)
_CODEC_SIZES = Sizes(("float32",), prefix=512, window=512, windows=4)


def sizes_of(config: QualityConfig) -> Sizes:
    """Those that are given, and the defaults of what is measured."""
    defaults = vars(_CODEC_SIZES if config.codec or config.select else _SIZES)
    given = {name: getattr(config, name) for name in defaults}
    return Sizes(**{name: defaults[name] if one is None else one for name, one in given.items()})


def complete(config: QualityConfig) -> QualityConfig:
    """With all `Sizes`, as results keep it."""
    return replace(config, **vars(sizes_of(config)))


def check(config: QualityConfig) -> None:
    """Raise `UserError` or `CodecError` for a value that no run could use."""
    config, sizes = complete(config), sizes_of(config)
    check_at_least_one(
        config,
        "prefix",
        "window",
        "windows",
        "chunk_size",
        "max_positions",
        "answers",
        "answer_tokens",
        "copy_lengths",
        "copy_strings",
    )
    if not sizes.dtypes or len(set(sizes.dtypes)) < len(sizes.dtypes):
        given = " ".join(sizes.dtypes)
        raise UserError(f"--dtypes must name one type or more, each once, got {given or 'none'}")
    if sizes.prefix % config.chunk_size:
        raise UserError(
            f"--prefix must be a multiple of --chunk-size {config.chunk_size}, of which only whole "
            f"ones are shared, got {sizes.prefix}"
        )
    check_seed(config.seed)
    check_heads(config)
    if config.codec or config.select:
        _check_codecs(config, sizes)


def _check_codecs(config: QualityConfig, sizes: Sizes) -> None:
    for codec in config.codec:
        check_codec(codec)
    if len(set(config.codec)) < len(config.codec) or "identity" in config.codec:
        raise UserError(
            f"--codec must name each codec once, and all are compared with identity; got "
            f"{' '.join(config.codec)}"
        )
    if len(set(config.select)) < len(config.select):
        raise UserError(f"--select must name each once, got {' '.join(config.select)}")
    check_choices(config.select, config.chunk_size)
    check_dense_layers(config.dense_layers, config.select)
    if len(sizes.dtypes) > 1:
        raise UserError(f"--codec and --select take one of --dtypes, got {' '.join(sizes.dtypes)}")
    if config.prefill_tokens < config.chunk_size:
        raise UserError(
            f"--prefill-tokens must hold a whole chunk of --chunk-size {config.chunk_size}, got "
            f"{config.prefill_tokens}"
        )
    check_copies(config.copy_lengths, config.copy_strings, config.chunk_size)


def copies_room(strings: int) -> int:
    """The fewest tokens of a text that so many strings can be hidden in at each depth."""
    return len(DEPTHS) * strings * 2 * STRING


def check_copies(lengths: tuple[int, ...], strings: int, chunk_size: int) -> None:
    """Raise `UserError` for `--copy-lengths` that cannot hide `--copy-strings`."""
    least = copies_room(strings)
    for length in lengths:
        if length < least or length % chunk_size:
            raise UserError(
                f"--copy-lengths must be whole chunks of --chunk-size {chunk_size}, and "
                f"{least:,} tokens at least to hide {strings} strings at each depth "
                f"(--copy-strings), got {length}"
            )
