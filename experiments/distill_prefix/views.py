"""What `distill-prefix` shows of a result: the divergence by steps, and the prefix's worth."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import figure_of_steps
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of

_BEHIND = {
    "prompt": "the system prompt",
    "prefix": "the prefix",
    "first": "the prompt's first tokens, as many",
    "nothing": "nothing",
}


def _title(result: Result) -> str:
    config = result.config
    return f"{config['tokens']} virtual tokens for a system prompt, {config['model']}"


def tables(result: Result) -> list[ResultTable]:
    """Divergence at every save; then memory and perplexity behind each."""
    columns = (
        Column("step"),
        Column("divergence, nats"),
        Column("held out"),
        Column("seconds", timed=True),
    )
    rows, seconds = [], 0.0
    for one in result.of_kind("steps"):
        seconds += one["seconds"]
        rows.append(
            (
                f"{one['step']:,}",
                f"{one['divergence']:.3f}",
                f"{one['held_out_divergence']:.3f}",
                f"{seconds:,.0f}",
            )
        )
    config = result.config
    notes = [
        "Divergence (KL) of the next token behind the virtual tokens from that behind the prompt, "
        "the mean over answers' tokens since the row before. Held out: of the answers to "
        f"{config['held_out']} questions that nothing is learned from."
    ]
    found = [table_of(_title(result), columns, rows, notes=notes)]
    return [*found, *(_worth(result, one) for one in result.of_kind("prefix"))]


def _worth(result: Result, one: dict) -> ResultTable:
    columns = (Column("behind", numeric=False), Column("KV MiB"), Column("perplexity"))
    sizes = {**one["bytes"], "first": one["bytes"]["prefix"], "nothing": 0}
    rows = [
        (what, f"{sizes[name] / 2**20:,.1f}", f"{one['perplexity'][name]:.3f}")
        for name, what in _BEHIND.items()
    ]
    notes = [
        f"Perplexity of {one['scored']:,} tokens of answers that were drawn behind the system "
        "prompt, by an engine, over the questions held out. There the prefix diverges by "
        f"{one['divergence']:.3f} nats a token, where it began as the prompt's first tokens by "
        f"{one['divergence_at_first']:.3f}. It is in the folder `prefix` of the results."
    ]
    return table_of("what it is worth", columns, rows, notes=notes)


def figures(result: Result) -> dict[str, Figure]:
    """Divergence, by steps."""
    steps = result.of_kind("steps")
    if not steps:
        return {}
    lines = {"read": "divergence", "held out": "held_out_divergence"}
    return {"divergence": figure_of_steps(steps, lines, _title(result), "divergence, nats a token")}
