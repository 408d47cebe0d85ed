"""The live prefix tree for the page: who shares what, and what the cache holds.

Taken by the engine's thread between two turns, at most once in `EVERY` seconds however many watch,
and not at all when nobody does. It has counts, and no tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.engine.stats import EngineStats
from jax_chunkattn.server.engine_thread import EngineThread
from jax_chunkattn.server.inbox import Ticket
from jax_chunkattn.tree.view import TreeView

EVERY = 0.5  # seconds
MOST_RUNS = 512
MOST_REQUESTS = 512


@dataclass(frozen=True)
class Seen:
    """One request, where it stands, and the chunks that it holds."""

    id: str
    tenant: str
    state: str
    prompt_tokens: int
    new_tokens: int
    chunk_ids: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    view: TreeView
    stats: EngineStats
    requests: tuple[Seen, ...]
    taken: float


class TreeWatch:
    """Gives everybody who watches the same snapshots."""

    def __init__(self, thread: EngineThread):
        self._thread = thread
        self._lock = asyncio.Lock()
        self._last: tuple[float, dict[str, Any]] | None = None

    async def now(self) -> dict[str, Any]:
        """As JSON values, at most `EVERY` seconds old."""
        async with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > EVERY:
                snapshot = await self._thread.view(take)
                told = await asyncio.to_thread(tell, snapshot)
                self._last = time.monotonic(), told
            return self._last[1]


def take(engine: Engine, tickets: Sequence[Ticket]) -> Snapshot:
    """In the engine's thread."""
    seen = [
        Seen(
            f"{ticket.inbox.id}/{ticket.first + sample}",
            ticket.inbox.tenant.name,
            handle.state,
            len(handle.prompt),
            len(handle.tokens),
            handle.chunk_ids,
        )
        for ticket in tickets[:MOST_REQUESTS]
        for sample, handle in enumerate(ticket.handles)
        if sample not in ticket.ended
    ]
    return Snapshot(engine.view_tree(MOST_RUNS), engine.stats, tuple(seen), time.time())


def tell(snapshot: Snapshot) -> dict[str, Any]:
    """As JSON values. A request is at the last run on its path."""
    view, stats = snapshot.view, snapshot.stats
    run_of = {chunk: index for index, run in enumerate(view.runs) for chunk in run.chunk_ids}
    requests = []
    for one in snapshot.requests:
        on_path = [run_of[chunk] for chunk in one.chunk_ids if chunk in run_of]
        requests.append(
            {
                "id": one.id,
                "tenant": one.tenant,
                "state": one.state,
                "prompt_tokens": one.prompt_tokens,
                "new_tokens": one.new_tokens,
                "chunks": len(one.chunk_ids),
                "run": on_path[-1] if on_path else None,
            }
        )
    use = stats.prompts
    return {
        "time": snapshot.taken,
        "chunk_size": view.chunk_size,
        "pool": {
            "chunks": view.num_chunks,
            "in_use": view.in_use,
            "cached": view.cached,
            "free": view.free,
            "evicted": stats.evictions,
            "bytes_per_chunk": stats.bytes_per_chunk,
        },
        "runs": [
            {
                "first": run.chunk_ids[0],
                "chunks": len(run.chunk_ids),
                "parent": run.parent,
                "namespace": run.namespace,
                "users": run.users,
                "computed": run.computed,
            }
            for run in view.runs
        ],
        "hidden_chunks": view.hidden,
        "requests": requests,
        "running": stats.running,
        "waiting": stats.waiting,
        "preemptions": stats.preemptions,
        "prompt_tokens": {**vars(use), "total": use.num_tokens},
        "decode_tokens": stats.decode_tokens,
        "prefill_tokens": stats.prefill_tokens,
        "plans": stats.plans,
        "plans_shared": stats.plans_shared,
        "plan_decision": stats.plan_decision,
        "chunk_reads": stats.planned_reads,
        "chunk_reads_saved": stats.planned_reads_unshared - stats.planned_reads,
    }
