"""`python -m experiments models`: what can be loaded, and the memory it takes.

Two tables: the architectures, with how closely they agree with transformers; and the presets, with
the memory of their weights and of the KV cache of a batch that shares a prefix, with and without
sharing. Nothing is run and no weights are read; `--model` shows one model, from its config alone.

    python -m experiments models
    python -m experiments models --model random:llama-3.1-8b --requests 64 --shared-tokens 4096
    python -m experiments models --mesh tp=8
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Command
from experiments.loading import parse_model
from experiments.models.config import ModelsConfig, check


def run(config: ModelsConfig) -> dict[str, Any]:
    """Print the tables, and return what they say.

    Raises:
        UserError: something in `config` cannot be used.
    """
    check(config)
    source = None if config.model is None else parse_model(config.model)
    from experiments.models.report import ModelsReport
    from experiments.models.sizes import summarise

    summary = summarise(config, source)
    ModelsReport().print(config, summary)
    return summary


MODELS = Command("models", ModelsConfig, run)
