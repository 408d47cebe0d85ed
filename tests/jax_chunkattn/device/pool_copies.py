"""Assertions that a compiled program updates the pool in place."""

from __future__ import annotations

from experiments.compile_report.pool_copies import pool_copies, pool_sized_operations

__all__ = ["assert_pool_is_updated_in_place", "pool_sized_operations"]


def assert_pool_is_updated_in_place(compiled, *, pool_bytes: int, layer_bytes: int) -> None:
    memory = compiled.memory_analysis()
    assert not pool_copies(
        hlo=compiled.as_text(),
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        pool_bytes=pool_bytes,
        layer_bytes=layer_bytes,
    )
