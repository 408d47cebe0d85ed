"""The cases of each suite, and how their sizes are divided to fit a machine."""

from __future__ import annotations

import dataclasses
import itertools

from experiments.harness.errors import UserError
from experiments.kernel.config import KernelConfig, parse_heads
from pallas_kernels import specs
from pallas_kernels.specs import AttentionCase

LEAST_ROWS, LEAST_CHUNK = 32, 16

TREES: tuple[AttentionCase, ...] = tuple(
    AttentionCase(tree, heads, kv_heads, 128)
    for heads, kv_heads in specs.PAT_HEADS
    for tree in specs.PAT_TREES
)

# Hydragen's micro benchmark (arXiv 2402.05099): its suffixes of 0 to 512, every 128 tokens.
HYDRAGEN: tuple[AttentionCase, ...] = tuple(
    AttentionCase(f"1,{batch}_{prefix},{suffix}", 8, 1, 128)
    for batch, prefix in ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
    for suffix in range(0, 513, 128)
)

SUITES = {"smoke": specs.SMOKE, "paper": specs.PAPER, "trees": TREES, "hydragen": HYDRAGEN}


@dataclasses.dataclass(frozen=True)
class SizedCase:
    """A case as its benchmark has it, and as it is run."""

    full: AttentionCase
    case: AttentionCase


def suite_cases(config: KernelConfig) -> list[SizedCase]:
    """The suite's cases with the config's heads, head size and dtype, divided by its scale.

    Raises:
        UserError: `--only` names a tree that the suite does not have.
    """
    cases = _named(SUITES[config.suite], config)
    if config.heads is not None:
        pairs = itertools.product(map(parse_heads, config.heads), cases)
        cases = [
            dataclasses.replace(case, num_heads=heads, num_kv_heads=kv_heads)
            for (heads, kv_heads), case in pairs
        ]
    cases = [
        dataclasses.replace(case, dtype=config.dtype, head_dim=config.head_dim or case.head_dim)
        for case in cases
    ]
    once = dict.fromkeys(cases)  # a tree that a suite has with several heads
    return [SizedCase(case, divided(case, config.divisor)) for case in once]


def _named(cases: tuple[AttentionCase, ...], config: KernelConfig) -> tuple[AttentionCase, ...]:
    if config.only is None:
        return cases
    known = dict.fromkeys(case.tree for case in cases)
    for tree in config.only:
        if tree not in known:
            raise UserError(
                f"--only {tree}: the suite {config.suite} has no such tree; it has "
                f"{' '.join(known)}"
            )
    return tuple(case for case in cases if case.tree in config.only)


def divided(case: AttentionCase, divisor: int) -> AttentionCase:
    """The case with its tokens, rows and chunks divided; branching above the rows stays.

    A node has whole chunks, at least one if it had a token. Rows are no fewer than `LEAST_ROWS`,
    nor than two below each node of the level above, where there were as many.
    """
    if divisor == 1:
        return case
    chunk = max(1, case.chunk_size // divisor)
    chunk = max(1 << chunk.bit_length() - 1, min(LEAST_CHUNK, case.chunk_size))
    tokens = [-(-count // (divisor * chunk)) * chunk for count in case.tokens_per_level]
    *upper, batch = case.nodes_per_level
    parents = upper[-1] if upper else 1
    rows = max(batch // divisor, min(batch, LEAST_ROWS), min(batch, 2 * parents))
    rows = -(-rows // parents) * parents
    return dataclasses.replace(
        case,
        tree=f"{_joined([*upper, rows])}_{_joined(tokens)}",
        chunk_size=chunk,
        ragged=case.ragged // divisor,
    )


def scaling_note(divisor: int) -> str | None:
    """What `divided` does, in a sentence; None where it does nothing."""
    if divisor == 1:
        return None
    return (
        f"sizes divided by {divisor}: tokens of a node (to whole chunks, at least one), rows (no "
        f"fewer than {LEAST_ROWS}, nor than two below a node), tokens of a chunk (no fewer than "
        f"{LEAST_CHUNK})"
    )


def _joined(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))
