"""`python -m experiments layers`: which layers should read everything where queries choose.

With `--select` the queries of a layer read a part of the chunks before them. Some layers mind far
more than others, and not the first ones. Here every layer chooses by itself, where all others read
everything, and what is measured is how far the predictions of a text are then off. The layers that
mind most are written into a file; with it the predictions are measured once more, beside those of a
model whose layers all choose.

    python -m experiments layers
    python -m experiments layers --model ./Llama-3.2-1B-Instruct --select bounds:0.1 --dense 4
    python -m experiments generate --select scores --dense-layers runs/layers-TIME/dense_layers.json

A run that was broken off goes on from the last layer that it measured.
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.layers.config import LayersConfig, check
from experiments.loading import parse_model


def run(config: LayersConfig) -> dict[str, Any]:
    """Measure the layers, write the file, print the table, and return the run's summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    with open_results("layers", config) as folder:
        from experiments.layers.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: the divergence with and without the layers that it found."""
    layers = " ".join(map(str, summary["dense_layers"]))
    return {"dense layers": layers, **{name: summary[name] for name in ("all_choose", "some_read")}}


LAYERS = Experiment("layers", LayersConfig, run, check, headline)
"""The options of `layers`."""
