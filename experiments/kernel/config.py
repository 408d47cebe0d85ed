"""The options of `kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import tyro

from experiments.harness.errors import UserError
from experiments.harness.options import by_default, check_above_zero, check_at_least_one, check_seed

Suite = Literal["smoke", "paper", "trees", "hydragen"]
Dtype = Literal["float32", "bfloat16", "float16"]
Implementation = Literal[
    "pallas_mosaic_gpu",
    "pallas_triton",
    "native",
    "batch_invariant",
    "xla",
    "xla-unshared",
    "cascade",
    "paged-shared-pages",
    "paged",
    "dense",
    "jax-dpa",
    "torch-sdpa",
    "reference",
    "native-int8",
    "native-int4",
    "native-int4/int2",
    "native-int2",
    "native-fp8",
    "xla-int8",
    "xla-int4",
    "xla-int4/int2",
    "xla-int2",
    "xla-fp8",
]
CODED: dict[str, tuple[str, str]] = {
    name: (name.split("-")[0], name.split("-")[1])
    for name in get_args(Implementation)
    if name.startswith(("xla-", "native-")) and name != "xla-unshared"
}
"""Of those that read codes, the implementation of attention and what chunks are encoded by."""

SCALES: dict[str, int] = {"smoke": 1, "paper": 1, "trees": 8, "hydragen": 8}
"""What the sizes of each suite are divided by unless `--scale` says otherwise."""


@dataclass(frozen=True)
class KernelConfig:
    """Time decode attention against baselines, a matrix product and the memory's bandwidth."""

    suite: Suite = "smoke"
    """The cases to run: a few small ones, those of the paper's table, PAT's trees, or Hydragen's
    micro benchmark."""

    implementations: Annotated[
        tuple[Implementation, ...] | None,
        tyro.conf.arg(
            help_behavior_hint="(default: all that run on this device over chunks as they are)"
        ),
    ] = None
    """What to time. `xla-unshared` plans every row by itself; `cascade` is one dense attention for
    each level of the tree; `paged` gathers each row's chunks from a pool with a copy per row,
    `paged-shared-pages` from the shared pool; `dense`, `jax-dpa` (jax.nn.dot_product_attention) and
    `torch-sdpa` (PyTorch's) have each row's keys and values in one piece; `xla-int4` and its like
    read chunks that a codec encoded, and each row's last chunk as it is. A codec's error is in
    theirs."""

    only: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(metavar="[TREE ...]", help_behavior_hint="(default: all)"),
    ] = None
    """Only these trees of the suite, such as 1,16_1024,64."""

    scale: Annotated[int | None, by_default("INT", "8 for trees and hydragen, else 1")] = None
    """Divide by this the tokens of a node (to whole chunks, at least one), the rows (no fewer than
    32, nor than two below a node) and the tokens of a chunk (no fewer than 16)."""

    heads: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(metavar="[QUERY/KV ...]", help_behavior_hint="(default: the suite's)"),
    ] = None
    """Query and KV heads, such as 32/8; every tree of the suite is run with each."""

    head_dim: Annotated[int | None, by_default("INT", "the suite's")] = None
    """Dimensions of a head."""

    dtype: Dtype = "float32"
    """Of queries, keys and values."""

    repeats: int = 5
    """Times each implementation is timed; the median, least and most are reported."""

    memory_gb: float = 8.0
    """Gigabytes (10^9 bytes) that a case's operands may take; implementations that would need
    more, in the order pool, `paged`, `dense` and its like, `cascade`, are skipped, and this is
    said."""

    seed: int = 0
    """Seed of keys, values, queries and ragged lengths."""

    output: Annotated[Path | None, by_default("FOLDER", "runs/kernel-TIME")] = None
    """Folder for the results: `results.jsonl` has a line for each case."""

    SMOKE: ClassVar[dict[str, Any]] = {
        "suite": "smoke",
        "only": ("1,16_1024,64",),
        "heads": ("9/3",),
        "scale": 8,
        "repeats": 2,
        "implementations": ("xla", "cascade", "paged"),
    }

    @property
    def divisor(self) -> int:
        """What sizes are divided by."""
        return SCALES[self.suite] if self.scale is None else self.scale


def check(config: KernelConfig) -> None:
    """Raise `UserError` for a value that no run could use."""
    named = config.implementations
    _check_known("suite", (config.suite,), get_args(Suite))
    _check_known("dtype", (config.dtype,), get_args(Dtype))
    _check_known("implementations", named or (), get_args(Implementation))
    if named == ():
        raise UserError("--implementations names nothing to time")
    if named is not None and len(set(named)) < len(named):
        raise UserError(f"--implementations names one twice: {' '.join(named)}")
    if config.only == ():
        raise UserError("--only names no trees, such as 1,16_1024,64")
    if config.heads == ():
        raise UserError("--heads names no heads, such as 32/8")
    for heads in config.heads or ():
        parse_heads(heads)
    check_at_least_one(config, "repeats", "scale", "head_dim")
    check_above_zero(config, "memory_gb")
    check_seed(config.seed)


def parse_heads(text: str) -> tuple[int, int]:
    """Query and KV heads of `32/8`.

    Raises:
        UserError: it names no such numbers.
    """
    query, slash, kv = text.partition("/")
    if slash and query.isdecimal() and kv.isdecimal():
        heads = int(query), int(kv)
        if 0 < heads[1] <= heads[0] and heads[0] % heads[1] == 0:
            return heads
    raise UserError(f"--heads {text}: give query heads and KV heads that divide them, such as 32/8")


def _check_known(option: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        if value not in known:
            raise UserError(f"--{option}: unknown {value!r}; known: {', '.join(known)}")
