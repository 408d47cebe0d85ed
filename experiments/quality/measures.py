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


@dataclass(frozen=True)
class Change:
    """What something does to predictions of a text.

    Attributes:
      perplexity_change: relative; `standard_error` is its own.
      divergence: KL of the next token's distribution, in nats; mean over the tokens of the text.
      same_token: share of the text's tokens for which both find the same token likeliest.
    """

    perplexity: float
    perplexity_change: float
    standard_error: float
    divergence: float
    same_token: float


@dataclass(frozen=True, kw_only=True)
class CodecMeasures(Change):
    """What one codec does, against chunks that are stored as they are.

    Attributes:
      reads: "chunks", as the pool has it; "as KIVI", whose last 128 tokens are exact; or "as
        KVQuant", of which none is.
      answers: share of the tokens of the model's own answers that the codec finds likeliest too.
      copied: share of hidden tokens found again, by the length of the text and at each depth.
      recall: of attention that chosen chunks keep, the mean and the 5th percentile over layers,
        heads and queries; None where all is read.
    """

    codec: str
    reads: str
    bytes_per_token: float | None
    answers: float | None
    copied: dict[str, list[float]]
    recall: dict[str, float] | None = None


def codec_measures(records: Sequence[Record]) -> list[CodecMeasures]:
    """Of every record, the first of which is of no codec."""
    exact = records[0]
    return [_codec_measures(exact, record) for record in records]


def _codec_measures(exact: Record, record: Record) -> CodecMeasures:
    answers = record.get("answers")
    return CodecMeasures(
        codec=record["codec"],
        reads=record["reads"],
        bytes_per_token=record.get("bytes_per_token"),
        answers=None if answers is None else float(np.mean(answers)),
        copied=record.get("copied", {}),
        recall=record.get("recall"),
        **vars(change_of(exact, record)),
    )


def change_of(exact: Record, record: Record) -> Change:
    """From one record of a text to another, of the same tokens."""
    worse = _logprobs(exact) - _logprobs(record)
    ratio = float(np.exp(worse.mean()))
    return Change(
        perplexity=perplexity(_logprobs(record)),
        perplexity_change=ratio - 1,
        standard_error=ratio * float(worse.std()) / worse.size**0.5,
        divergence=float(np.mean(record["divergence"])),
        same_token=float(np.mean(np.equal(record["greedy"], exact["greedy"]))),
    )


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
