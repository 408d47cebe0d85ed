"""What an engine's rows have read of what was before them, where they choose it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.harness.reading import Record

if TYPE_CHECKING:
    from jax_chunkattn.engine.stats import EngineStats


def reads_record(stats: EngineStats) -> Record | None:
    """For a line of results; None where rows read everything."""
    reads = stats.reads
    if reads is None:
        return None
    return {
        "selected_share": _rounded(reads.selected_share),
        "union_factor": _rounded(reads.union_factor),
        "by_layer": [
            {"selected_share": _rounded(share), "union_factor": _rounded(factor)}
            for share, factor in reads.by_layer
        ],
    }


def reads_note(record: Record) -> str:
    """In words, for people."""
    share, factor = record["selected_share"], record["union_factor"]
    note = f"rows read {share or 0:.1%} of the chunks before them as they decoded"
    if factor is not None:
        note += f", of shared ones together {factor:.2f} times what one of them chose"
    return note


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
