"""`python -m experiments calibrate`: codecs fitted to a model, each in a file that `--codec` takes.

KVQuant (arXiv 2401.18079) stores keys before they are rotated, scaled by the range of each channel,
as codes of a codebook that was fitted to the layer. Both are found here, from passes over pieces of
a text; it takes a minute or two on two cores for SmolLM2. The same command goes on with a run that
was broken off.

    python -m experiments calibrate
    python -m experiments calibrate --codec nuq3 --text book.txt --windows 32
    python -m experiments generate --codec runs/calibrate-TIME/nuq3.safetensors

With `--ladder` the steps are fitted that lead from rounding token by token to KVQuant's codec, to
be compared by `quality --codec`.
"""

from __future__ import annotations

from typing import Any

from experiments.calibrate.config import CalibrateConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model


def run(config: CalibrateConfig) -> dict[str, Any]:
    """Fit the codecs, print the table, and return the run's summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("calibrate", config) as folder:
        from experiments.calibrate.run import calibrate

        return calibrate(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: bytes of a token with its first codec."""
    first, *_ = summary["codecs"]
    return {"codec": first["codec"], "bytes per token": first["bytes_per_token"]}


CALIBRATE = Experiment("calibrate", CalibrateConfig, run, check, headline)
