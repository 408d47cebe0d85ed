"""Prefix-aware attention for LLM decoding: a chunk pool, a prefix tree, and decoding over them."""

from jax_chunkattn.admission import InvalidRequest, chunks_needed
from jax_chunkattn.allocator import ChunkAllocator, PoolExhausted
from jax_chunkattn.model_interface import CacheSpec, DecoderModel
from jax_chunkattn.planner import PlannerOptions, PlanSummary, plan_decode
from jax_chunkattn.pool import CacheConfig, ChunkPool, allocate_pool
from jax_chunkattn.prefix_tree import PrefixTree
from jax_chunkattn.requests import Progress, Request, SessionStats
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.session import DecodeSession
from pallas_kernels import DecodePlan, chunk_attention, prefill_attention

__all__ = [
    "CacheConfig",
    "CacheSpec",
    "ChunkAllocator",
    "ChunkPool",
    "DecodePlan",
    "DecodeSession",
    "DecoderModel",
    "InvalidRequest",
    "PlanSummary",
    "PlannerOptions",
    "PoolExhausted",
    "PrefixTree",
    "Progress",
    "Request",
    "SamplingParams",
    "SessionStats",
    "allocate_pool",
    "chunk_attention",
    "chunks_needed",
    "plan_decode",
    "prefill_attention",
]
