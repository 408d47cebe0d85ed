"""Peers that come with PyTorch, where it is installed: FlashInfer's cascade, and its own SDPA.

Nothing here is imported by anything but the parts that time it, and a failure here is a record.
Calls are captured in a CUDA graph, because starting them from Python takes longer than some do.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.gpu.clock import Side
from pallas_kernels.specs import AttentionCase

SDPA, FLASHINFER = "torch sdpa", "flashinfer cascade"
PAGE = 16  # divides the tokens of every level of PAT's trees
_CALLS, _COPIES_BYTES = 8, 1 << 29
_WORKSPACE = 256 << 20


def missing(name: str) -> str | None:
    """What a peer needs and is not here, or None."""
    for package in ("torch",) if name == SDPA else ("torch", "flashinfer"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    import torch  # pyright: ignore[reportMissingImports]

    return None if torch.cuda.is_available() else "torch sees no GPU"


def unsupported(name: str, case: AttentionCase) -> str | None:
    """Why a peer cannot run a case, or None."""
    if name == FLASHINFER and any(tokens % PAGE for tokens in case.tokens_per_level):
        return f"its pages of {PAGE} tokens do not divide a level"
    return None


def side(name: str, case: AttentionCase, seed: int) -> Side:
    """The peer on random data; only on a GPU."""
    import torch  # pyright: ignore[reportMissingImports]

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int):
        kind = getattr(torch, case.dtype)
        return torch.randn(shape, generator=generator, device=device, dtype=kind)

    call = (_sdpa if name == SDPA else _cascade)(torch, case, normal, device)
    return Side(_captured(torch, call), _CALLS)


def _sdpa(torch: Any, case: AttentionCase, normal: Callable, device) -> Callable[[int], Any]:
    """Every row has its keys and values in one piece of its own."""
    tokens = sum(case.tokens_per_level)
    shape = (case.batch, case.num_kv_heads, tokens, case.head_dim)
    one = 2 * np.prod(shape, dtype=float) * 2
    copies = max(1, min(_CALLS, int(_COPIES_BYTES // one)))
    q = normal(case.batch, case.num_heads, 1, case.head_dim)
    pools = [(normal(*shape), normal(*shape)) for _ in range(copies)]
    attend = torch.nn.functional.scaled_dot_product_attention

    def call(index: int):
        return attend(q, *pools[index % copies], enable_gqa=case.num_heads > case.num_kv_heads)

    return call


def _cascade(torch: Any, case: AttentionCase, normal: Callable, device) -> Callable[[int], Any]:
    """A level of the tree is a level of the cascade; every node has pages of its own."""
    import flashinfer  # pyright: ignore[reportMissingImports]

    def integers(values):
        return torch.tensor(np.asarray(values), dtype=torch.int32, device=device)

    levels = [
        (nodes, tokens // PAGE)
        for nodes, tokens in zip(case.nodes_per_level, case.tokens_per_level, strict=True)
        if tokens
    ]
    queries, page_begins, pages, last = [], [], [], []
    first = 0
    for nodes, node_pages in levels:
        queries.append(integers(np.arange(nodes + 1) * case.batch // nodes))
        page_begins.append(integers(np.arange(nodes + 1) * node_pages))
        pages.append(integers(first + np.arange(nodes * node_pages)))
        last.append(integers(np.full(nodes, PAGE)))
        first += nodes * node_pages
    workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(levels), workspace, "NHD")
    q = normal(case.batch, case.num_heads, case.head_dim)
    wrapper.plan(
        queries,
        page_begins,
        pages,
        last,
        case.num_heads,
        case.num_kv_heads,
        case.head_dim,
        PAGE,
        q_data_type=q.dtype,
    )
    shape = (first, 2, PAGE, case.num_kv_heads, case.head_dim)
    copies = max(1, min(_CALLS, int(_COPIES_BYTES // (2 * np.prod(shape, dtype=float)))))
    pools = [normal(*shape) for _ in range(copies)]
    return lambda index: wrapper.run(q, pools[index % copies])


def _captured(torch: Any, call: Callable[[int], Any]) -> Callable[[int], Any]:
    """`_CALLS` calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for index in range(2):
            call(index)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call(index) for index in range(_CALLS)]

    class Started:
        def __init__(self, results: list) -> None:
            self.results = results

        def block_until_ready(self):
            torch.cuda.synchronize()
            return self

    def replay(_: int) -> Started:
        graph.replay()
        return Started(kept)

    return replay
