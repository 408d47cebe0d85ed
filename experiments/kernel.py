"""`python -m experiments kernel`: decode attention alone, timed against baselines and limits.

Every implementation attends to the same tokens of the same random pool. They are timed in one run
and in turns, each time with the caches full of something else, as between two layers of a model.
Timed among them are two limits: one large matrix product of as many floating-point operations, and
reading memory.

The suite `smoke` takes half a minute, most of it compilation. `paper` is the grid of
ChunkAttention's Table 3 (arXiv 2402.15220): 32 sequences, 32 heads of 128, chunks of 64, in
float32; it takes some minutes on two cores, and 9 GB.

    python -m experiments kernel
    python -m experiments kernel --suite paper
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_above_zero, check_at_least_one, check_seed
from experiments.harness.results import open_results

Suite = Literal["smoke", "paper"]
Implementation = Literal[
    "pallas_mosaic_gpu",
    "pallas_triton",
    "xla",
    "xla-unshared",
    "paged-shared-pages",
    "paged",
    "dense",
    "reference",
]


@dataclass(frozen=True)
class KernelConfig:
    """Time decode attention against baselines, a matrix product and the memory's bandwidth."""

    suite: Suite = "smoke"
    """The cases to run: a few small ones, or those of the paper's table."""

    implementations: Annotated[
        tuple[Implementation, ...] | None,
        tyro.conf.arg(help_behavior_hint="(default: all that run on this device)"),
    ] = None
    """What to time. `xla-unshared` plans every row by itself; `paged` gathers each row's chunks
    from a pool with a copy per row, `paged-shared-pages` from the shared pool; `dense` has each
    row's keys and values in one piece."""

    repeats: int = 5
    """Times each implementation is timed; the median, least and most are reported."""

    memory_gb: float = 8.0
    """Gigabytes (10^9 bytes) that a case's operands may take; implementations that would need
    more, in the order pool, `paged`, `dense`, are skipped, and this is said."""

    seed: int = 0
    """Seed of keys, values, queries and ragged lengths."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/kernel-TIME")] = None
    """Folder for the results: `results.jsonl` has a line for each case."""


def run(config: KernelConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("kernel", config) as folder:
        from experiments.kernel_run import run_suite

        return run_suite(config, folder)


def check(config: KernelConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    named = config.implementations
    _check_known("suite", (config.suite,), get_args(Suite))
    _check_known("implementations", named or (), get_args(Implementation))
    if named == ():
        raise UserError("--implementations names nothing to time")
    if named is not None and len(set(named)) < len(named):
        raise UserError(f"--implementations names one twice: {' '.join(named)}")
    check_at_least_one(config, "repeats")
    check_above_zero(config, "memory_gb")
    check_seed(config.seed)


def _check_known(option: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise UserError(f"--{option}: unknown {value!r}; known: {', '.join(known)}")
