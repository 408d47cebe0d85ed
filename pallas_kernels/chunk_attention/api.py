"""Decode attention over a chunk pool, in two phases."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.implementations import Operation
from pallas_kernels.plans import DecodePlan, DecodeReads, HostOrDevice, windows_of_heads
from pallas_kernels.stored_kv import StoredKV

CHUNK_ATTENTION: Operation[DecodeReads] = Operation(
    "pallas_kernels.chunk_attention",
    "chunk_attention",
    ("reference", "xla", "native", "batch_invariant", "pallas_triton", "pallas_mosaic_gpu"),
)
IMPLEMENTATIONS = CHUNK_ATTENTION.implementations


def chunk_attention(
    q: Float[HostOrDevice, "B Hq D"],
    keys: Float[HostOrDevice, "L Hkv N C D"],
    values: Float[HostOrDevice, "L Hkv N C D"],
    plan: DecodePlan,
    lengths: Int32[HostOrDevice, " B"],
    *,
    layer: int | Int32[Array, ""] = 0,
    scale: float | None = None,
    softcap: float | None = None,
    head_windows: Int32[HostOrDevice, " Hkv"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Hq D"]:
    """Softmax attention of one query per row over that row's chunks of the pool.

    ChunkAttention, arXiv 2402.15220, section 3.2: a chunk-first phase reads every shared run of
    chunks once for all the rows below it, a sequence-first phase adds each row's private chunks
    and merges. Accumulates in float32 whatever the dtype.
    The Pallas implementations round queries to the pool's dtype, which tensor cores multiply.

    Args:
      q: queries; query head `h` reads KV head `h // (Hq // Hkv)`.
      keys, values: the pool of all layers.
      plan: which chunks each row reads, as `jax_chunkattn.plan_decode` makes it. The Pallas
        implementations need one with partials, made with `PlannerOptions.for_gpu`.
      lengths: tokens each row attends to, from `plan.covered_tokens` to what the row's chunks in
        the plan hold. A row of length 0 that no item covers, such as padding, gives zeros; a row of
        less than its items cover attends to all that they cover.
      layer: which layer of the pool to read; may be traced.
      scale: multiplies the scores; `1 / sqrt(D)` by default.
      softcap: keeps scaled scores within (-softcap, softcap), as `softcap * tanh(score / softcap)`
        (Gemma 2, arXiv 2408.00118, section 2). None leaves them as they are.
      head_windows: by which of the windows that the plan was made for each KV head reads, from 0 to
        W - 1; None by the first. For plans with windows; the row's query is its last token then.
      implementation: one of `IMPLEMENTATIONS`, or None for the best that runs here: Mosaic on
        Hopper GPUs, Triton on other NVIDIA GPUs from Ampere on, the compiled kernel (`native`) on
        CPUs with a C++ compiler, which takes seconds when it is first used, XLA elsewhere.

    Raises:
      ValueError: for an implementation that is unknown or cannot run here, a plan without what it
        needs, heads that do not divide, a head_dim that differs from the pool's, a softcap that is
        not positive and finite, or windows of heads for a plan that has none.
    """
    stored = StoredKV(jnp.asarray(keys), jnp.asarray(values), layer)
    sizes = q.shape[1], stored.kv_heads, stored.head_dim
    attention = AttentionSpec.of(*sizes, scale=scale, softcap=softcap)
    reads = DecodeReads(plan, lengths, head_windows=windows_of_heads(plan, head_windows, sizes[1]))
    return CHUNK_ATTENTION.attend(q, stored, reads, attention, implementation=implementation)
