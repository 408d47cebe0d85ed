"""How many requests the run without sharing takes on."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.generate.comparison import affordable_batch

ROOMY: dict[str, Any] = {
    "max_tokens": 10,
    "tokens_per_second": 100.0,
    "bytes_per_token": 1.0,
    "free_bytes": None,
    "seconds": 30.0,
}


@pytest.mark.parametrize(
    ("lengths", "changes", "expected"),
    [
        ([100] * 8, {}, 8),
        ([1000] * 8, {}, 3),
        ([1000] * 8, {"seconds": 45.0}, 4),
        ([1000] * 8, {"tokens_per_second": 200.0}, 6),
        ([9000] * 8, {}, 1),
        ([1000, 3000, 10], {}, 1),
        ([100] * 8, {"free_bytes": 660}, 3),
        ([100] * 8, {"free_bytes": 659}, 2),
        ([100] * 8, {"tokens_per_second": 0.0}, 1),
    ],
)
def test_affordable_batch(lengths: list[int], changes: dict[str, Any], expected: int) -> None:
    assert affordable_batch(lengths, **{**ROOMY, **changes}) == expected
