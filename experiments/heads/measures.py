"""From the records of `heads` to the numbers that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.harness.reading import Record
from experiments.quality.measures import Change, change_of


@dataclass(frozen=True, kw_only=True)
class HeadMeasures(Change):
    """What a share of a pattern's heads does, against all heads.

    Attributes:
      kept_bytes: what a sequence's heads would have to keep, by its length.
      copied: share of hidden tokens found again, by the length of the text and at each depth.
    """

    pattern: str
    share: float
    kept_bytes: dict[str, int]
    copied: dict[str, list[float]]


def head_measures(records: Sequence[Record]) -> list[HeadMeasures]:
    """Of every record, the first of which is of all heads."""
    names = ("pattern", "share", "kept_bytes", "copied")
    return [
        HeadMeasures(**vars(change_of(records[0], one)), **{name: one[name] for name in names})
        for one in records
    ]
