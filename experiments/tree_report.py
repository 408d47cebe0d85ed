"""What `tree` prints for people."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from experiments.harness.console import make_console
from experiments.tree import TreeConfig

_OPERATIONS = {
    "match": "match",
    "insert_known": "insert, cached",
    "release_known": "release",
    "insert_new": "insert, new",
    "insert_copying": "insert, part copied",
    "remove_new": "remove",
}


class TreeReport:
    """Tables on standard output; plain text where that is not a terminal."""

    def __init__(self):
        self._console = make_console()

    def print_costs(self, config: TreeConfig, summary: dict[str, Any]) -> None:
        """Time per prompt by size of the tree and by number of children, and memory."""
        title = (
            f"Microseconds per prompt of {config.prompt_tokens:,} tokens in chunks of "
            f"{config.chunk_size}: median (95th percentile) of {config.samples}"
        )
        table = Table(title=title, title_justify="left")
        for heading in ("nodes", "root's children", *_OPERATIONS.values()):
            table.add_column(heading, justify="right")
        for kind in ("growth", "children"):
            for record in summary[kind]:
                table.add_row(
                    f"{record['nodes']:,}",
                    f"{record['root_children']:,}",
                    *(_cost(record[operation]) for operation in _OPERATIONS),
                )
            table.add_section()
        self._console.print(table)
        self._console.print(
            f"{summary['bytes_per_node']:.0f} bytes per node (growth of resident memory); "
            f"evicting {config.prompt_tokens // config.chunk_size} chunks takes "
            f"{_cost(summary['evict_microseconds'])} microseconds"
        )

    def print_planning(self, records: list[dict[str, Any]]) -> None:
        """Time of a plan by the options it is made with."""
        title = (
            f"Microseconds per plan of {records[0]['rows']} rows over {records[0]['chunks']:,} "
            "chunks: median (95th percentile)"
        )
        self._console.print(title, style="italic")  # the table is too narrow for a title
        table = Table()
        table.add_column("options")
        table.add_column("plan", justify="right")
        for record in records:
            table.add_row(record["options"], _cost(record["plan"]))
        self._console.print(table)


def _cost(quantiles: dict[str, float]) -> str:
    return f"{quantiles['median']:.0f} ({quantiles['p95']:.0f})"
