"""Mean and percentiles of times, as results and tables have them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

PERCENTILES = (50, 90, 99)
NAMES = tuple(f"p{percent}" for percent in PERCENTILES)


def percentiles(values: Iterable[float], digits: int = 6) -> dict[str, float] | None:
    """Mean and `PERCENTILES`, linear between the nearest two values; None of nothing."""
    each = np.fromiter(values, float)
    if not each.size:
        return None
    found = dict(zip(NAMES, np.percentile(each, PERCENTILES), strict=True))
    return {name: round(float(one), digits) for name, one in {"mean": each.mean(), **found}.items()}
