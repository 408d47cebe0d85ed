"""What our attention is measured against, and the float64 attention that all are held to."""

from experiments.baselines.cascade import Level, NotUniform, cascade_attention, cascade_levels
from experiments.baselines.dense import dense_attention, dense_copies, pad_tables
from experiments.baselines.exact import exact_attention
from experiments.baselines.library import (
    jax_dot_product_attention,
    matrix_products,
    torch_attention,
    torch_missing,
)
from experiments.baselines.paged import paged_attention, pool_of_copies

__all__ = [
    "Level",
    "NotUniform",
    "cascade_attention",
    "cascade_levels",
    "dense_attention",
    "dense_copies",
    "exact_attention",
    "jax_dot_product_attention",
    "matrix_products",
    "pad_tables",
    "paged_attention",
    "pool_of_copies",
    "torch_attention",
    "torch_missing",
]
