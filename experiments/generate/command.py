"""`python -m experiments generate`: many questions behind one system prompt, answered together."""

from __future__ import annotations

import time
from typing import Any

from experiments.generate.config import GenerateConfig, check
from experiments.generate.inputs import read_inputs
from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results


def run(config: GenerateConfig) -> dict[str, Any]:
    """Run the experiment and return its summary.

    Raises:
        UserError: something in `config`, or a file it names, cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    started = time.perf_counter()
    check(config)
    inputs = read_inputs(config)
    with open_results("generate", config) as folder:
        from experiments.generate.run import generate

        return generate(config, inputs, folder, started)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    compare = summary["compare"] or {}
    return {
        "decode tokens/s": summary["decode_tokens_per_second"],
        "decode tokens/s, unshared": compare.get("decode_tokens_per_second"),
        "KV MiB": summary["kv_bytes_held"] / 2**20,
        "KV MiB, unshared": summary["kv_bytes_unshared"] / 2**20,
    }


GENERATE = Experiment("generate", GenerateConfig, run, check, headline)
