"""The options of `sparse`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_at_least_one, check_seed
from experiments.select_option import CHOICES, check_choices

PREFILL_TOKENS = 512
PRIVATE_TOKENS = 100


@dataclass(frozen=True)
class SparseConfig:
    """Time attention to a part of the tokens beside attention to all."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "contexts": (1024,),
        "windows": (128,),
        "select": (),  # takes long to compile
        "layers": 1,
        "rows": 2,
        "heads": "2/1",
        "head_dim": 16,
        "repeats": 1,
    }

    contexts: tuple[int, ...] = (2048, 4096, 8192, 16384)
    """Tokens of the prefix that all rows have in common; each has 100 more of its own."""

    windows: tuple[int, ...] = (4096, 1024, 512)
    """How many tokens a query sees, itself among them."""

    select: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar=CHOICES,
            help_behavior_hint="(default: scores:0.1 bounds:0.1)",
        ),
    ] = ("scores:0.1", "bounds:0.1")
    """Policies, and the share of the chunks before it that a query reads by them."""

    agreement: float = 0.9
    """How alike the rows' queries are: the cosine between any two, of which it depends how many
    chunks they choose together."""

    layers: int = 8
    """Layers that attend one after another, each to keys of its own: some of choosing is done once
    for all of them."""

    rows: int = 32
    """Sequences that decode together."""

    heads: str = "9/3"
    """Query and KV heads."""

    head_dim: int = 64
    """Dimensions of a head."""

    chunk_size: int = 64
    """Tokens in a chunk."""

    repeats: int = 5
    """Times each is timed; the median, least and most are reported."""

    seed: int = 0
    """Seed of keys, values and queries."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/sparse-TIME")] = None
    """Folder for the results."""

    @property
    def num_heads(self) -> tuple[int, int]:
        query, kv = self.heads.split("/")
        return int(query), int(kv)


def check(config: SparseConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    counts = "layers", "rows", "head_dim", "chunk_size", "repeats"
    check_at_least_one(config, "contexts", "windows", *counts)
    try:
        query, kv = config.num_heads
    except ValueError:
        query = kv = 0
    if query < 1 or kv < 1 or query % kv:
        raise UserError(f"--heads {config.heads} is not query heads/KV heads, such as 32/8")
    short = min(config.contexts)
    if short < PREFILL_TOKENS or any(context % config.chunk_size for context in config.contexts):
        raise UserError(
            f"--contexts must be whole chunks of {config.chunk_size} tokens and at least "
            f"{PREFILL_TOKENS}, got {' '.join(map(str, config.contexts))}"
        )
    check_seed(config.seed)
    if not 0 <= config.agreement <= 1:
        raise UserError(f"--agreement must be from 0 to 1, got {config.agreement}")
    check_choices(config.select, config.chunk_size)
