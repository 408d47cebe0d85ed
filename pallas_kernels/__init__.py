"""Attention kernels over a chunk pool, and the references they are held to."""

from pallas_kernels.chunk_attention import chunk_attention
from pallas_kernels.kv_write import write_kv
from pallas_kernels.plans import DecodePlan, PrefillPlan
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.windows import Window, WindowMap

__all__ = [
    "DecodePlan",
    "PrefillPlan",
    "Window",
    "WindowMap",
    "chunk_attention",
    "prefill_attention",
    "write_kv",
]
