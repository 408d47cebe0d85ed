"""How long a replica's device takes: a few numbers, fitted to what an engine was measured to take.

A prompt's tokens cost their projections, and a pair for each token they attend to. A decode step
costs a time of its own, one for each row, one for each cached token that is read, and one for each
row that a token is read for: what rows share is read once and multiplied with all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from experiments.harness.reading import Record


@dataclass(frozen=True)
class DeviceModel:
    """Seconds.

    Attributes:
      call, token, pair: of a prefill call, of each token of a prompt, and of each two tokens of
        which one attends to the other.
      step, row, read, product: of a decode step, for each row, for each token read, and for each
        token and row that attends to it.
    """

    call: float
    token: float
    pair: float
    step: float
    row: float
    read: float
    product: float

    def prefill(self, begin: int, tokens: int, calls: int) -> float:
        """Of so many tokens of a prompt behind `begin` others."""
        pairs = tokens * (begin + (tokens + 1) / 2)
        return calls * self.call + tokens * self.token + pairs * self.pair

    def decode(self, rows: int, distinct: int, read: int, steps: int) -> float:
        """Of so many steps of all rows, which have `read` tokens before them at the first, of which
        `distinct` are stored: each step adds a token for each row."""
        grown = rows * steps * (steps - 1) / 2
        first = self.step + rows * self.row + distinct * self.read + read * self.product
        return steps * first + grown * (self.read + self.product)

    def unshared(self, prompt: int, answer: int, call_tokens: int, rows: int) -> float:
        """Of a request that finds nothing, and whose steps are those of `rows` others too."""
        calls = -(-prompt // call_tokens)
        alone = self.decode(1, prompt, prompt, answer) - answer * self.step * (1 - 1 / rows)
        return self.prefill(0, prompt, calls) + alone


def fit_device(prefills: Sequence[Record], decodes: Sequence[Record], call_tokens: int) -> Record:
    """The model that errs least on measured points, each by its share: a record of it.

    `prefills` have `tokens` and `seconds`; `decodes` `rows`, `distinct`, `read`, and the `seconds`
    of a step.
    """
    prefill_terms = [
        (-(-one["tokens"] // call_tokens), one["tokens"], one["tokens"] * (one["tokens"] + 1) / 2)
        for one in prefills
    ]
    decode_terms = [(1, one["rows"], one["distinct"], one["read"]) for one in decodes]
    prefill, prefill_errors = _least_relative_squares(prefill_terms, prefills)
    decode, decode_errors = _least_relative_squares(decode_terms, decodes)
    model = DeviceModel(*prefill, *decode)
    return {
        **asdict(model),
        "errors": {
            name: {"median": round(float(np.median(errors)), 4), "most": round(max(errors), 4)}
            for name, errors in (("prefill", prefill_errors), ("decode", decode_errors))
        },
    }


def model_of(record: Record) -> DeviceModel:
    """The model of a record of `fit_device`. Raises KeyError or TypeError for anything else."""
    names = DeviceModel.__dataclass_fields__
    return DeviceModel(**{name: float(record[name]) for name in names})


def _least_relative_squares(
    terms: Sequence[Sequence[float]], points: Sequence[Record]
) -> tuple[list[float], list[float]]:
    """Factors of the terms, none below 0, and how far each point is from what they say."""
    seconds = np.array([one["seconds"] for one in points])
    rows: Any = np.array(terms, np.float64) / seconds[:, None]
    scale = rows.max(axis=0)
    factors, _ = nnls(rows / scale, np.ones(len(points)))
    factors = factors / scale
    return factors.tolist(), np.abs(rows @ factors - 1).tolist()
