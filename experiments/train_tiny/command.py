"""`python -m experiments train-tiny`: a small GPT-2 with many KV heads, trained from scratch.

For what needs a model that has learned something where no hub can be reached, and for what needs
many KV heads, which small published models no longer have. It is trained on the help that ships
with Python, but for its beginning, and reads bytes; it takes some minutes on two cores. The same
command goes on with a run that was broken off, from the state that was saved last.

    python -m experiments train-tiny
    python -m experiments train-tiny --text book.txt --layers 4 --steps 1000
    python -m experiments models --model runs/train-tiny-TIME/model
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.train_tiny.config import TrainTinyConfig, check


def run(config: TrainTinyConfig) -> dict[str, Any]:
    """Train, write the checkpoint, print the table, and return the run's summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("train-tiny", config) as folder:
        from experiments.train_tiny.run import train

        return train(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: how well the text that was held out is predicted."""
    return {name: summary[name] for name in ("bits_per_byte", "parameters", "steps_done")}


TRAIN_TINY = Experiment("train-tiny", TrainTinyConfig, run, check, headline)
