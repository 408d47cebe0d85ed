"""`python -m experiments quality`: what sharing a prefix does to a model's predictions: nothing.

A text is cut into a prefix and windows, and every window is read behind the prefix, as questions
are behind one system prompt. The log-probability of each token of the windows is computed three
ways: by a plain causal forward pass over the prefix and the window, with dense attention and no
cache; by `Engine.score` of the windows behind a prefix that is computed once; and by decoding all
windows together, a token a step, fed as the text has it, in two-phase attention over that pool.

Shown are the perplexity of each, how far log-probabilities are apart, and how often both find the
same token likeliest. In float32 only the order of sums differs. In half precision every way rounds
differently, so each is also held against the plain pass in float32.

The text is the system prompt that ships with the project with its questions behind it, 2,326 tokens
of SmolLM2; or any other in a file. It takes 7 minutes on two cores, most of them for the plain
passes. A model without a tokenizer reads the bytes of the text.

    python -m experiments quality
    python -m experiments quality --text book.txt --dtypes float32 --windows 64

With `--codec` it shows what codecs of the KV cache do to predictions, each against the same prefill
over chunks that are stored as they are: how far the distributions are apart (KL divergence), what
that does to the perplexity, how often the likeliest token is the same, in the text and in answers
of the model's own, and how much the model still finds of strings of random tokens that it read long
before. Beside each stands the same codec read as its paper has it: KIVI keeps the last 128 tokens
exact, KVQuant none.
The text is then the help that ships with Python (`pydoc_data.topics`).

    python -m experiments quality --codec int8 int4 int4/int2

With `--select` it shows the same of queries that read a share of the chunks before them.

    python -m experiments quality --select scores:0.2 bounds:0.2 recent:0.2 random:0.2
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.loading import parse_model
from experiments.quality.config import QualityConfig, check, complete


def run(config: QualityConfig) -> dict[str, Any]:
    """Run the experiment, print its table, and return its summary.

    Raises:
        UserError: something in `config` cannot be used.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    config = complete(config)
    source = parse_model(config.model)
    with open_results("quality", config) as folder:
        if config.codec or config.select:
            from experiments.quality.run_codecs import measure
        else:
            from experiments.quality.run import measure

        return measure(config, source, folder)


def headline(summary: dict[str, Any]) -> dict[str, float | str | None]:
    """The numbers of a run that a sweep shows, those of its first type or codec."""
    if "codecs" in summary:
        _, first, *_ = summary["codecs"]
        return {name: first[name] for name in ("divergence", "same_token", "perplexity_change")}
    first = summary["dtypes"][0]
    decode = first["paths"]["decode"]
    return {
        "perplexity, plain": first["paths"]["plain"]["perplexity"],
        "perplexity, shared": decode["perplexity"],
        "largest difference of log-probabilities": decode["largest_difference"],
        "same likeliest token": decode["greedy_agreement"],
    }


QUALITY = Experiment("quality", QualityConfig, run, check, headline)
