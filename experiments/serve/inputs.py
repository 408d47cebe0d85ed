"""What a run of `serve` is given: its model, and the requests of a trace."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.loading import ModelSource, parse_model
from experiments.serve.config import ServeConfig
from experiments.trace import TraceRequest, read_requests


@dataclass(frozen=True)
class Inputs:
    """What the user's files and names came to; `trace` is None for made-up requests."""

    model: ModelSource
    trace: list[TraceRequest] | None


def read_inputs(config: ServeConfig) -> Inputs:
    """Read the files `config` names. Raises `UserError`."""
    model = parse_model(config.model)
    if config.trace is None:
        return Inputs(model, None)
    return Inputs(model, read_requests(config.trace, config.requests, every=config.every))
