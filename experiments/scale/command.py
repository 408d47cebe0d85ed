"""`python -m experiments scale`: one engine of several, in actors of Ray.

The same requests are served by an engine in this process, and by fleets of actors, with prefixes
known to the router or not. Then actors are killed in the middle of streams: another one is started,
and the requests go on elsewhere behind the tokens that have been. Every answer must be that of the
one engine (exit code 1 if one is not). On one machine actors share its processors: this shows what
routing and replacing cost and find, not how fast a cluster is. Needs the extra `ray`.

    python -m experiments scale
    python -m experiments scale --kills 20 --model random:tiny
"""

from __future__ import annotations

import importlib.util
from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.errors import CheckFailed, UserError
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.scale.config import ScaleConfig, check


def check_installed() -> None:
    """Raise `UserError` where there is no Ray."""
    if importlib.util.find_spec("ray") is None:
        raise UserError("`scale` needs Ray: pip install 'jax_chunkattn[ray]'")


def run(config: ScaleConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, and return its summary.

    Raises:
        UserError: a value that no run could use, or there is no Ray.
        CheckFailed: an answer is not that of the one engine.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    check_installed()
    source = parse_model(config.model)
    with open_results("scale", config) as folder:
        from experiments.scale.run import measure

        summary = measure(config, source, folder)
    if summary["different"]:
        raise CheckFailed(f"{summary['different']} answers are not one engine's", summary)
    return summary


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    return {
        "tokens found": max(one["hit_rate"] for one in summary["rounds"]),
        "longest pause, seconds": max((one["pause"] for one in summary["kills"]), default=None),
    }


SCALE = Experiment("scale", ScaleConfig, run, check, headline)
