"""What `scale` shows: fleets by policy, and what became of streams whose actor was killed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def tables(result: Result) -> list[ResultTable]:
    """Rounds, and kills if there were any."""
    shown = [_rounds(result)]
    return [*shown, _kills(result)] if result.of_kind("kills") else shown


def figures(result: Result) -> dict[str, Figure]:
    """None: on one machine there is nothing that grows."""
    return {}


def _rounds(result: Result) -> ResultTable:
    config = result.config
    columns = [
        Column("replicas"), Column("policy", numeric=False), Column("prompt tokens found"),
        Column("requests by replica"), Column("answers that differ"),
        Column("tokens/s", timed=True), Column("µs to submit", timed=True),
        Column("s to start", timed=True),
    ]  # fmt: skip
    rows = [
        (
            str(one["replicas"]),
            one["policy"],
            f"{one['hit_rate']:.1%}",
            ", ".join(map(str, one["by_replica"])),
            str(one["different"]),
            f"{one['tokens_per_second']:.0f}",
            f"{one['submit_microseconds']:.0f}",
            f"{one['start_seconds']:.1f}",
        )
        for one in result.of_kind("round")
    ]
    notes = [
        f"{config['requests']} requests of {config['families']} families, with "
        f"{config['shared_tokens']} tokens in common and {config['own_tokens']} of their own, "
        f"{config['at_once']} at once; pools of {config['pool_tokens']:,} tokens. Requests by "
        "replica have those that warm it up. All actors share this machine's processors.",
    ]
    title = f"Engines of {config['model']} in actors of Ray {result.header['ray']}"
    return table_of(title, columns, rows, notes=notes)


def _kills(result: Result) -> ResultTable:
    [record] = result.of_kind("kills")
    rows = [
        (
            str(number),
            str(kill["moved"]),
            str(kill["tokens_before"]),
            f"{kill['pause']:.2f}",
        )
        for number, kill in enumerate(record["kills"], 1)
    ]
    columns = [
        Column("kill"), Column("streams that went on elsewhere", timed=True),
        Column("tokens that they had", timed=True), Column("longest pause, s", timed=True),
    ]  # fmt: skip
    notes = [
        f"{record['different']} answers differ from one engine's; {record['lost']} actors were "
        "lost and replaced."
    ]
    return table_of("Actors killed in the middle of streams", columns, rows, notes=notes)
