"""`python -m experiments sparse`: what attention costs that reads a part of the tokens.

Layers and heads with windows see the last tokens only. Attention to windows of several sizes is
timed beside attention to all tokens, in one run and in turns: a decode step of many rows behind one
prefix, and a prefill call at the end of it. Both should cost less the smaller the window is, and
with a window no more however long the context.

Beside them stands attention to a share of the chunks, that queries choose by a policy, choosing
included. What rows choose alike they read together, so `--agreement` counts.

    python -m experiments sparse
    python -m experiments sparse --contexts 2048 16384 --windows 512 4096 --heads 32/8
    python -m experiments sparse --contexts 16384 --select scores:0.1 scores:0.2 --agreement 0.8
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.sparse.config import SparseConfig, check


def run(config: SparseConfig) -> dict[str, Any]:
    """Run the experiment, print its table, draw its picture, and return its summary.

    Raises:
        UserError: a value that no run could use.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("sparse", config) as folder:
        from experiments.sparse.run import measure

        return measure(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run: what was named last, in the longest context, against all."""
    longest = summary["contexts"][-1]
    full, *_, last = longest["sides"]
    return {
        f"{name} time": round(last[name]["median"] / full[name]["median"], 3)
        for name in ("decode", "prefill")
    }


SPARSE = Experiment("sparse", SparseConfig, run, check, headline)
