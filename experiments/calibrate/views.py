"""What `calibrate` shows of a result: the files, and what a token takes with them."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of


def tables(result: Result) -> list[ResultTable]:
    config = result.config
    columns = (
        Column("file", numeric=False),
        Column("codec", numeric=False),
        Column("bytes a token"),
        Column("tokens in float16's bytes"),
    )
    rows = [
        (
            one["file"],
            one["codec"],
            f"{one['bytes_per_token']:,.0f}",
            f"{one['float16_bytes_per_token'] / one['bytes_per_token']:.2f}",
        )
        for one in result.of_kind("codec")
    ]
    sampled = sum(one["sampled"] for one in result.of_kind("window"))
    note = (
        f"Fitted to keys and values of {sampled:,} tokens in {config['windows']} windows of "
        f"{config['window']:,}. Bytes with chunks of 64 tokens."
    )
    return [table_of(f"{config['model']}: calibrated codecs", columns, rows, notes=[note])]


def figures(result: Result) -> dict[str, Figure]:
    """None: what the codecs do to predictions, `quality --codec` draws."""
    return {}
