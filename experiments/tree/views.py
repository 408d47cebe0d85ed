"""What `tree` shows of a result."""

from __future__ import annotations

from matplotlib.figure import Figure

from experiments.harness.plotting import line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, table_of

_OPERATIONS = {
    "match": "match",
    "insert_known": "insert, cached",
    "release_known": "release",
    "insert_new": "insert, new",
    "insert_copying": "insert, part copied",
    "remove_new": "remove",
}


def tables(result: Result) -> list[ResultTable]:
    """Time per prompt by size of the tree and number of children, and time per plan."""
    summary = result.summary or {}
    return [_costs(summary), _planning(summary["planning"])]


def figures(result: Result) -> dict[str, Figure]:
    """Time per prompt as the tree grows: flat, but for what no longer fits the caches."""
    summary = result.summary or {}
    figure = make_figure(7.0, 3.8)
    axes = figure.subplots()
    nodes = [one["nodes"] for one in summary["sizes"]]
    for index, (name, label) in enumerate(_OPERATIONS.items()):
        medians = [one[name]["median"] for one in summary["sizes"]]
        axes.plot(nodes, medians, label=label, **line_style(index))
    title = f"A prompt of {summary['prompt_tokens']:,} tokens"
    plain_axes(axes, title, "chunks in the tree", "microseconds, median")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return {"picture": figure}


def _costs(summary: Record) -> ResultTable:
    columns = [Column("nodes"), Column("root's children")]
    columns += [Column(label, timed=True) for label in _OPERATIONS.values()]
    chunks = summary["prompt_tokens"] // summary["chunk_size"]
    return table_of(
        f"Microseconds per prompt of {summary['prompt_tokens']:,} tokens in chunks of "
        f"{summary['chunk_size']}: median (95th percentile) of {summary['samples']}",
        columns,
        map(_row, summary["sizes"]),
        map(_row, summary["children"]),
        timed_notes=[
            f"{summary['bytes_per_node']:.0f} bytes per node (growth of resident memory); "
            f"evicting {chunks} chunks takes {_cost(summary['evict_microseconds'])} microseconds"
        ],
    )


def _row(record: Record) -> tuple[str, ...]:
    sizes = (f"{record['nodes']:,}", f"{record['root_children']:,}")
    return (*sizes, *(_cost(record[operation]) for operation in _OPERATIONS))


def _planning(records: list[Record]) -> ResultTable:
    return table_of(
        f"Microseconds per plan of {records[0]['rows']} rows over {records[0]['chunks']:,} "
        "chunks: median (95th percentile)",
        [Column("options", numeric=False), Column("plan", timed=True)],
        [(record["options"], _cost(record["plan"])) for record in records],
    )


def _cost(quantiles: dict[str, float]) -> str:
    return f"{quantiles['median']:.0f} ({quantiles['p95']:.0f})"
