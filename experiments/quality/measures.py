"""From the log-probabilities of `quality` to the numbers that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.harness.reading import Record

PATHS = ("plain", "prefill", "decode")
EXACT = ("float32", "plain")


@dataclass(frozen=True)
class Measures:
    """One way of computing in one type. Differences are of log-probabilities, in nats.

    Attributes:
      difference: of this perplexity less that of the plain pass in the same type.
      largest_difference, mean_difference: absolute, from the plain pass in the same type.
      greedy_agreement: share of positions where both find the same token likeliest.
      mean_error: mean absolute difference from the plain pass in float32; None without it.
    """

    dtype: str
    path: str
    perplexity: float
    difference: float
    largest_difference: float
    mean_difference: float
    greedy_agreement: float
    mean_error: float | None


def measures_of(records: Sequence[Record]) -> list[Measures]:
    """Of every dtype and path; each dtype has a plain pass."""
    by_unit = {(record["dtype"], record["path"]): record for record in records}
    return [_measures(by_unit, *unit) for unit in by_unit]


def differences(records: Sequence[Record], dtype: str, path: str) -> np.ndarray:
    """Absolute differences of all log-probabilities from the plain pass in the same type."""
    by_unit = {(record["dtype"], record["path"]): record for record in records}
    return np.abs(_logprobs(by_unit[dtype, path]) - _logprobs(by_unit[dtype, "plain"]))


def perplexity(logprobs: np.ndarray) -> float:
    """e to the mean negative log-probability."""
    return float(np.exp(-logprobs.mean()))


def _measures(by_unit: dict[tuple[str, str], Record], dtype: str, path: str) -> Measures:
    record, plain = by_unit[dtype, path], by_unit[dtype, "plain"]
    ours, theirs = _logprobs(record), _logprobs(plain)
    apart = np.abs(ours - theirs)
    exact = by_unit.get(EXACT)
    return Measures(
        dtype=dtype,
        path=path,
        perplexity=perplexity(ours),
        difference=perplexity(ours) - perplexity(theirs),
        largest_difference=float(apart.max()),
        mean_difference=float(apart.mean()),
        greedy_agreement=float(np.mean(np.equal(record["greedy"], plain["greedy"]))),
        mean_error=float(np.abs(ours - _logprobs(exact)).mean()) if exact is not None else None,
    )


def _logprobs(record: Record) -> np.ndarray:
    return np.asarray(record["logprobs"], np.float64).ravel()
