"""ChunkAttention's published kernel latencies (arXiv 2402.15220, Table 3): A100-80GB, fp16."""

from __future__ import annotations

from typing import Any

LABEL = "published, A100 fp16"

# By the tree: PagedAttention, PagedAttention on shared pages, ChunkAttention; microseconds.
_MICROSECONDS: dict[str, tuple[int, int, int]] = {
    "32_1024": (356, 356, 333),
    "1,32_512,512": (355, 258, 199),
    "1,32_1024,64": (355, 154, 56),
    "32_2048": (703, 704, 655),
    "1,32_1024,1024": (703, 505, 384),
    "1,32_2048,64": (704, 338, 110),
    "32_4096": (1401, 1400, 1302),
    "1,32_2048,2048": (1401, 999, 748),
    "1,32_4096,64": (1400, 664, 206),
}


def published_speedups(record: dict[str, Any], ours: str | None) -> dict[str, float]:
    """How many times faster than PagedAttention they were, by the implementation it is like.

    Nothing for a case of another shape.
    """
    shape = (record["num_heads"], record["num_kv_heads"], record["head_dim"], record["ragged"])
    times = _MICROSECONDS.get(record["tree"])
    if times is None or shape != (32, 32, 128, 0):
        return {}
    paged, shared_pages, chunked = times
    found = {"paged-shared-pages": paged / shared_pages}
    return found if ours is None else {**found, ours: paged / chunked}
