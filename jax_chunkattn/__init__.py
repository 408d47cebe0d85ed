"""Prefix-aware attention for LLM decoding: a chunk pool, a prefix tree, and decoding over them."""

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.compilation_cache import use_compilation_cache
from jax_chunkattn.device.logical_axes import MeshError
from jax_chunkattn.device.model_interface import CacheSpec, DecoderModel
from jax_chunkattn.device.pool import ChunkPool, allocate_pool
from jax_chunkattn.device.weights import InvalidWeights
from jax_chunkattn.engine.admission import InvalidRequest, RequestLimits, chunks_needed
from jax_chunkattn.engine.beam_search import Hypothesis, beam_search
from jax_chunkattn.engine.engine import Engine
from jax_chunkattn.engine.handle import PinnedPrefix, RequestHandle
from jax_chunkattn.engine.learned_prefix import LearnedPrefix
from jax_chunkattn.engine.outputs import (
    Completion,
    EngineClosed,
    Output,
    RequestFailed,
    Score,
    StreamEvent,
)
from jax_chunkattn.engine.search_expansion import (
    Candidate,
    Continuations,
    Expansion,
    NextTokens,
    SearchNode,
)
from jax_chunkattn.engine.search_selection import Beam, BestFirst, Puct, Selected
from jax_chunkattn.engine.search_tree import SearchTree
from jax_chunkattn.engine.stats import EngineStats, WarmUp
from jax_chunkattn.engine.tree_search import SearchFailed, tree_search
from jax_chunkattn.engine.virtual_tokens import InvalidPrefix
from jax_chunkattn.planning.planner import PlannerOptions, PlanSummary, plan_decode
from jax_chunkattn.replicas.router import NoReplica, OverloadRule, Router, RouterStats
from jax_chunkattn.sampling import SamplingParams, TokenLogprobs
from jax_chunkattn.training.token_tree import TokenTree
from jax_chunkattn.training.tree_log_probs import tree_log_probs
from jax_chunkattn.tree.allocator import ChunkAllocator, PoolExhausted
from jax_chunkattn.tree.kv_events import KVEvents
from jax_chunkattn.tree.prefix_tree import PrefixTree
from pallas_kernels import DecodePlan, Window, WindowMap, chunk_attention, prefill_attention
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.selection import ChunkSelector

__version__ = "0.1.0"

__all__ = [
    "Beam",
    "BestFirst",
    "CacheConfig",
    "CacheSpec",
    "Candidate",
    "ChunkAllocator",
    "ChunkPool",
    "ChunkSelector",
    "Completion",
    "Continuations",
    "DecodePlan",
    "DecoderModel",
    "Engine",
    "EngineClosed",
    "EngineStats",
    "Expansion",
    "HeadClusters",
    "Hypothesis",
    "InvalidPrefix",
    "InvalidRequest",
    "InvalidWeights",
    "KVEvents",
    "LearnedPrefix",
    "MeshError",
    "NextTokens",
    "NoReplica",
    "Output",
    "OverloadRule",
    "PinnedPrefix",
    "PlanSummary",
    "PlannerOptions",
    "PoolExhausted",
    "PrefixTree",
    "Puct",
    "RequestFailed",
    "RequestHandle",
    "RequestLimits",
    "Router",
    "RouterStats",
    "SamplingParams",
    "Score",
    "SearchFailed",
    "SearchNode",
    "SearchTree",
    "Selected",
    "StreamEvent",
    "TokenLogprobs",
    "TokenTree",
    "WarmUp",
    "Window",
    "WindowMap",
    "__version__",
    "allocate_pool",
    "beam_search",
    "chunk_attention",
    "chunks_needed",
    "plan_decode",
    "prefill_attention",
    "tree_log_probs",
    "tree_search",
    "use_compilation_cache",
]
