"""What the timed parts time: cases, each with its sides, the most important first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.gpu import peer_paged, peer_torch
from pallas_kernels import specs
from pallas_kernels.specs import AttentionCase

MOSAIC, TRITON, XLA = "pallas_mosaic_gpu", "pallas_triton", "xla"


@dataclass(frozen=True)
class OwnSide:
    """One of our implementations with a plan.

    Attributes:
      work: fields of `GpuWork` that are not the default ones.
      query_tile: of Mosaic's chunk-first phase, where it is not the default one.
      label: what tells the side from others of its implementation.
      codec: what its chunks are encoded by.
    """

    implementation: str
    label: str = ""
    sharing: bool = True
    work: tuple[tuple[str, Any], ...] = ()
    query_tile: int | None = None
    codec: str | None = None

    @property
    def name(self) -> str:
        return f"{self.implementation} {self.label}".strip()


@dataclass(frozen=True)
class Job:
    """A case and what is timed on it; peers are named."""

    case: AttentionCase
    own: tuple[OwnSide, ...]
    peers: tuple[str, ...] = ()


def unshared(implementation: str) -> OwnSide:
    return OwnSide(implementation, "unshared", sharing=False)


def packed(implementation: str, packing: str) -> OwnSide:
    return OwnSide(implementation, packing, work=(("packing", packing),))


_PAIR = (OwnSide(MOSAIC), unshared(MOSAIC))
_BOTH = (*_PAIR, OwnSide(TRITON))
_CODECS = tuple(
    OwnSide(implementation, codec, codec=codec)
    for implementation in (MOSAIC, TRITON)
    for codec in ("int8", "int4", "fp8")
)
_PACKINGS = tuple(packed(MOSAIC, rule) for rule in ("pat", "fasttree"))


def paper_jobs() -> list[Job]:
    """ChunkAttention's Table 3, in bfloat16, then grouped-query attention, then float16."""

    def cases(dtype: str, kv_heads: int) -> list[AttentionCase]:
        return [
            dataclasses.replace(case, dtype=dtype, num_kv_heads=kv_heads)
            for case in reversed(specs.PAPER)
        ]

    first = []
    for case in cases("bfloat16", 32):
        # PyTorch's attention takes the same time whatever is shared: once for each length.
        shares = len(case.nodes_per_level) > 1
        peers = (peer_paged.NAME, peer_torch.FLASHINFER if shares else peer_torch.SDPA)
        own = _BOTH
        if case.tree.startswith("1,32_2048"):
            own = (*_BOTH, *_CODECS, *_PACKINGS, OwnSide(XLA), unshared(TRITON))
        first.append(Job(case, own, peers))
    # More rows than the paper's, to be held against the device's limits.
    wide = [
        AttentionCase(f"1,{batch}_{shared},64", heads, kv_heads, 128, dtype="bfloat16")
        for batch, shared in ((64, 4096), (128, 8192))
        for heads, kv_heads in ((32, 32), (32, 8))
    ]
    return [
        *first,
        *(Job(case, (*_BOTH, *_CODECS)) for case in wide),
        *(Job(case, _BOTH, (peer_paged.NAME,)) for case in cases("bfloat16", 8)),
        *(Job(case, _BOTH) for case in cases("float16", 32)),
        *(Job(case, _PAIR) for case in cases("float16", 8)),
    ]


def tree_jobs() -> list[Job]:
    """PAT's trees, for each head configuration; Triton and the packings for the commonest."""
    jobs = []
    for heads, kv_heads in sorted(specs.PAT_HEADS, key=lambda heads: heads != (32, 8)):
        common = (heads, kv_heads) == (32, 8)
        for tree in specs.PAT_TREES:
            case = AttentionCase(tree, heads, kv_heads, 128, dtype="bfloat16")
            own = _PAIR
            if common:
                own = (*_BOTH, *(_PACKINGS if len(case.nodes_per_level) > 2 else ()))
            jobs.append(Job(case, own, (peer_torch.FLASHINFER,)))
    return jobs


def hydragen_jobs() -> list[Job]:
    """Hydragen's micro benchmark: one prefix, many rows, one KV head."""
    return [
        Job(
            AttentionCase(f"1,{batch}_{prefix},{suffix}", 8, 1, 128, dtype="bfloat16"),
            _BOTH,
            (peer_torch.FLASHINFER,),
        )
        for suffix in (64, 0, 512, 256)
        for batch, prefix in ((512, 1024), (1024, 2048), (2048, 4096), (4096, 8192))
    ]


def tune_jobs() -> list[Job]:
    """The planner's constants and a kernel's tile, one at a time, on three cases of the paper."""
    from jax_chunkattn.planning.planner import GpuCosts

    variants = [OwnSide(MOSAIC)]
    for tokens in (128, 512, 1024):
        work = (("min_piece_tokens", tokens),)
        variants.append(OwnSide(MOSAIC, f"min_piece_tokens {tokens}", work=work))
    for programs in (1, 3, 4):
        work = (("costs", GpuCosts(programs_per_sm=programs)),)
        variants.append(OwnSide(MOSAIC, f"programs_per_sm {programs}", work=work))
    for chunks in (0, 1, 4, 8):
        work = (("max_private_chunks", chunks),)
        variants.append(OwnSide(MOSAIC, f"max_private_chunks {chunks}", work=work))
    wide = (("query_tile", 128), ("align", 64))
    variants.append(OwnSide(MOSAIC, "query_tile 128", work=wide, query_tile=128))
    cases = [
        AttentionCase("1,32_4096,64", 32, 32, 128, dtype="bfloat16"),
        AttentionCase("1,32_2048,2048", 32, 32, 128, dtype="bfloat16"),
        AttentionCase("1,64_4096,64", 32, 8, 128, dtype="bfloat16"),
    ]
    return [Job(case, tuple(variants)) for case in cases]


def rehearsed(jobs: Sequence[Job]) -> list[Job]:
    """One of the jobs, with all peers, on a case that an interpreter can run."""
    tiny = AttentionCase("1,2,4_32,16,4", 4, 1, 16, chunk_size=16)
    most = max(jobs, key=lambda job: len(job.own))
    peers = tuple({peer: None for job in jobs for peer in job.peers})
    return [dataclasses.replace(most, case=tiny, peers=peers)]
