"""Engines over the toy model, small enough to be made in every test."""

from __future__ import annotations

from collections.abc import Sequence

from jax_chunkattn import CacheConfig, Engine, PlannerOptions
from tests.jax_chunkattn.toy import toy_model

SHARE_ALL = PlannerOptions(worth_sharing=lambda rows, chunks: rows > 1)
STORED = (
    "clusters", "codec", "disk", "disk_memory", "dtype", "host_memory", "load", "selector",
    "window_chunks",
)  # fmt: skip


def make_engine(num_chunks: int = 200, chunk_size: int = 16, **options) -> Engine:
    """Every pool size and every `steps_per_call` costs programs to compile: best leave them."""
    options = {"planner": SHARE_ALL, "max_running": 16, "steps_per_call": 3, **options}
    model = options.pop("model", None) or toy_model()
    stored = {name: options.pop(name) for name in STORED if name in options}
    return Engine(model, CacheConfig(num_chunks, chunk_size, **stored), **options)


class BytePairs:
    """A tokenizer for the toy model: its 256 token ids are the 256 bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def run(handles):
    """The tokens of each, when all are done."""
    return [list(handle.result().tokens) for handle in handles]


def assert_all_returned(engine: Engine) -> None:
    """Nothing is lost: what was released is free or cached, and after a reset free."""
    engine.check()
    stats = engine.stats
    assert (stats.running, stats.waiting, stats.held, stats.pinned) == (0, 0, 0, 0)
    assert stats.chunks_in_use == 0
    assert stats.chunks_free + stats.chunks_cached == engine.cache.num_chunks
    engine.reset()
    assert engine.stats.chunks_free == engine.cache.num_chunks
    engine.check()
