"""What prefix-aware attention is measured against: decode attention that shares no reads."""

from experiments.baselines.dense import dense_attention, dense_copies, pad_tables
from experiments.baselines.exact import exact_attention
from experiments.baselines.paged import paged_attention, pool_of_copies

__all__ = [
    "dense_attention",
    "dense_copies",
    "exact_attention",
    "pad_tables",
    "paged_attention",
    "pool_of_copies",
]
