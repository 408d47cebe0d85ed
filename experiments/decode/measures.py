"""From the times of `decode` to tokens per second and ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from experiments.harness.reading import Record

SIDES = ("shared", "unshared")


@dataclass(frozen=True)
class Spread:
    """Of the same number in every round."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Measured:
    """One value of what a study varies, at one shared length.

    Attributes:
      rates: tokens per second, and `kv_bytes` the bytes of keys and values held, of each side that
        was not skipped.
      ratio: how many times as fast the shared side is; each ratio is of one round. None without
        both sides.
      equal_rows: rows that choose the same tokens on both sides, of `rows`.
      attention_share: operations of attention to the prompt, for one of the products with weights.
      skipped: why a side was not measured.
    """

    x: int
    shared_tokens: int
    rows: int
    rates: dict[str, Spread]
    ratio: Spread | None
    kv_bytes: dict[str, int]
    equal_rows: int | None
    attention_share: float
    skipped: dict[str, str]


def measured(study: str, records: Sequence[Record]) -> list[Measured]:
    """Every value that was measured, in order, one series of a shared length after another."""
    return [
        _measured(study, record, index)
        for record in records
        for index in range(len(record["completions"]))
    ]


_FIELDS = {
    "batch": "rows",
    "shared": "shared_tokens",
    "chunk-size": "chunk_size",
    "steps": "steps_per_call",
}


def _measured(study: str, record: Record, index: int) -> Measured:
    tokens = record["completions"][index]
    rates = {
        name: [record["rows"] * tokens / taken[index] for taken in side["seconds"]]
        for name, side in record["sides"].items()
    }
    ratio = None
    if set(rates) == set(SIDES):
        pairs = zip(*(rates[side] for side in SIDES), strict=True)
        ratio = Spread.of([shared / unshared for shared, unshared in pairs])
    return Measured(
        x=tokens if study == "completion" else record[_FIELDS[study]],
        shared_tokens=record["shared_tokens"],
        rows=record["rows"],
        rates={name: Spread.of(values) for name, values in rates.items()},
        ratio=ratio,
        kv_bytes={name: side["kv_bytes"] for name, side in record["sides"].items()},
        equal_rows=record["equal_rows"],
        attention_share=record["operations"]["attention"] / record["operations"]["products"],
        skipped=record["skipped"],
    )
