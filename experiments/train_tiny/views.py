"""What `train-tiny` shows of a result: how the loss fell, and how the model ended."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import figure_of_steps
from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of


def _title(result: Result) -> str:
    config = result.config
    return f"GPT-2, {config['layers']} layers of {config['heads']} heads, {config['hidden']} wide"


def tables(result: Result) -> list[ResultTable]:
    """Bits of each byte, read and held out, at every save."""
    config = result.config
    columns = (
        Column("step"),
        Column("bytes read"),
        Column("bits a byte"),
        Column("held out"),
        Column("seconds", timed=True),
    )
    rows, seconds = [], 0.0
    for one in result.of_kind("steps"):
        seconds += one["seconds"]
        rows.append(
            (
                f"{one['step']:,}",
                f"{one['step'] * config['batch'] * config['context']:,}",
                f"{one['bits_per_byte']:.3f}",
                f"{one['held_out_bits_per_byte']:.3f}",
                f"{seconds:,.0f}",
            )
        )
    text = "Python's help" if config["text"] is None else config["text"]
    notes = [
        f"Trained on {text}, but for its first {config['held_out']:,} bytes. Bits a byte: mean "
        "over the steps since the row before. Held out: of the beginning of those first bytes, in "
        f"whole sequences; {config['short_share']:.0%} of the steps read short ones only."
    ]
    for one in result.of_kind("model"):
        notes.append(
            f"The model, {one['parameters']:,} weights: {one['bits_per_byte']:.3f} bits a byte, a "
            f"perplexity of {one['perplexity']:.2f}, over {one['scored']:,} bytes held out, in "
            f"sequences of {config['context']:,}. It is in the folder `model` of the results."
        )
    return [table_of(_title(result), columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """Bits of each byte, by steps."""
    steps = result.of_kind("steps")
    if not steps:
        return {}
    lines = {"read": "bits_per_byte", "held out": "held_out_bits_per_byte"}
    return {"loss": figure_of_steps(steps, lines, _title(result), "bits a byte")}
