"""`python -m experiments search`: a tree search over answers, on forks of one prompt.

At every depth the best partial answers are forked, each into several that go on differently; the
worst are dropped. All of them share the prompt and whatever they have in common behind it: a fork
copies one chunk at most and computes nothing again.

    python -m experiments search --question "Why is the sky blue?" --width 3 --keep 2 --depth 4
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.errors import UserError
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.prompts import read_system_prompt
from experiments.search.config import SearchConfig, check


def run(config: SearchConfig) -> dict[str, Any]:
    """Run the search, print its tree, and return its summary.

    Raises:
        UserError: something in `config`, or a file it names, cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    source = parse_model(config.model)
    if source.is_random:
        raise UserError("--model: a search over answers needs a tokenizer; random models have none")
    system_prompt = read_system_prompt(config.system_prompt)
    with open_results("search", config) as folder:
        from experiments.search.run import search

        return search(config, source, system_prompt, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    return {name: summary[name] for name in ("score", "branches", "kv_bytes_held")}


SEARCH = Experiment("search", SearchConfig, run, check, headline)
