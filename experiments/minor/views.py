"""What `minor` shows of a result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.harness.reading import Result
from experiments.harness.tables import Column, ResultTable, table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "head_tokens": "tokens in query heads, all",
    "own_head_tokens": "the answer's",
    "kv_head_tokens": "tokens in KV heads",
    "kv_head_chunks": "chunks in KV heads",
    "layer_chunks": "chunks in layers",
    "model_chunks": "chunks in the model",
}


def tables(result: Result) -> list[ResultTable]:
    """What need not be read, and what could be dropped at the end."""
    summary = result.summary or {}
    columns = (Column("recent"), Column("chunk"), *map(Column, _TITLES.values()))
    rows = [
        (
            str(one["recent"]),
            str(one["chunk_size"]),
            *(f"{one[name]['reads']:.1%} ({one[name]['end']:.1%})" for name in _TITLES),
        )
        for one in summary["measured"]
    ]
    notes = [
        "Of what every step of an answer would read, how much no query head that reads it found "
        "important in the last steps; in brackets, of what is there at the last step. The first "
        "column is of all tokens, as CORM drops them; the others of those that no other row "
        "shares. Chunks are dropped whole: by a KV head, by all of a layer, by all layers.",
    ]
    title = (
        f"{summary['model']}: {summary['rows']} answers of {summary['max_tokens']:,} tokens behind "
        f"{summary['shared_tokens']:,} shared ones, temperature {summary['temperature']:g}"
    )
    return [table_of(title, columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """None: the table says it all."""
    return {}
