"""What all cases of a kernel run say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

OURS = ("pallas_mosaic_gpu", "pallas_triton", "native", "xla", "reference")


def ours_of(implementations: Sequence[str]) -> str | None:
    """Which of them is ours, and what the others are compared with; None where none is."""
    return next((name for name in OURS if name in implementations), None)


def sides_of(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured on a case, by the implementation."""
    return {side["implementation"]: side for side in record["implementations"]}


def median_of(record: dict[str, Any], implementation: str) -> float:
    """Milliseconds of what was measured."""
    return sides_of(record)[implementation]["milliseconds"]["median"]


def summarise(records: Sequence[dict[str, Any]], ours: str | None) -> dict[str, dict[str, Any]]:
    """By the implementation: how many cases it ran, and how it did in them.

    `ours_faster` is the geometric mean of its time over ours in the cases that both ran, with the
    least and the most. `of_floor` is the median.
    """
    names = dict.fromkeys(
        side["implementation"]
        for record in records
        for side in (*record["implementations"], *record["skipped"])
    )
    return {name: _summary_of(name, records, ours) for name in names}


def _summary_of(name: str, records: Sequence[dict[str, Any]], ours: str | None) -> dict[str, Any]:
    measured = [sides_of(record)[name] for record in records if name in sides_of(record)]
    ratios = [
        median_of(record, name) / median_of(record, ours)
        for record in records
        if ours is not None and {name, ours} <= sides_of(record).keys()
    ]
    return {
        "cases": len(measured),
        "skipped": len(records) - len(measured),
        "ours_faster": _rounded(math.exp(statistics.fmean(map(math.log, ratios))))
        if ratios
        else None,
        "ours_faster_least": _rounded(min(ratios)) if ratios else None,
        "ours_faster_most": _rounded(max(ratios)) if ratios else None,
        "of_floor": _rounded(statistics.median(side["of_floor"] for side in measured))
        if measured
        else None,
        "max_error": max((side["max_error"] for side in measured), default=None),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
