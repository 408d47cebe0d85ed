"""What an engine has done so far, and how it stands."""

from __future__ import annotations

from dataclasses import dataclass, field

from jax_chunkattn.device.read_counts import ReadCounts
from jax_chunkattn.engine.misses import PromptUse
from jax_chunkattn.engine.residency import TierStats
from jax_chunkattn.planning.planner import PlanSummary
from pallas_kernels.codecs import IDENTITY


@dataclass(frozen=True)
class WarmUp:
    """What `Engine.warm_up` did: programs compiled, those not counted that were there, and how long
    it took, in seconds of wall time."""

    programs: int
    seconds: float


@dataclass
class EngineStats:
    """Counters since the engine was made, and sizes as they are now. Seconds are wall time.

    Attributes:
      running, waiting, held, pinned: requests being computed, queued, finished but kept for forks;
        pinned prefixes, learned ones among them.
      learned_prefixes: those that requests may name.
      chunks_in_use, chunks_cached, chunks_free: of the pool; they add up to its size.
      submitted, finished, aborted, failed: requests. Those still to come are not in the last three.
      not_finite: of the failed requests, those that ended because the model's logits were NaN or
        infinite.
      forks: sequences that began as copies of others.
      preemptions: requests sent back to the queue because the pool was full.
      recoveries: times the pool was rebuilt after an error.
      evictions: cached chunks given up for others.
      prompts: prompt tokens by where they came from: found in the cache, or why not.
      prefill_tokens: tokens computed by prefill, those computed again after a preemption included.
      weights_version: how often the model's weights have been replaced.
      scored_tokens: tokens that were given, of which it was said how likely they were.
      decode_tokens: tokens chosen by decoding, the first of each request not included.
      prefill_seconds, decode_seconds: the device was busy with either.
      host_seconds: the engine's own work: scheduling, tree, plans, text; while the device computes
        or not. Neither waiting for the device nor compiling is in it.
      compilations, compile_seconds: programs compiled, and the time that took.
      calls: decode calls to the device.
      plans, plans_shared, plan_seconds: decode plans made, those of them that share, time for them.
      plan: the decision when there was most to read.
      planned_reads, planned_reads_unshared: chunks that a step of each decode call reads, per layer
        and KV head, added up over the calls; the same if every row read its own.
      shared_tokens: the longest prefix that two rows had in common, in full chunks.
      most_chunks_in_use, most_chunks_unshared: the most that was in use at once, and what the same
        requests would have held at that moment without sharing.
      codec: what full chunks are encoded by; "identity" where they are stored as they are.
      clusters: how many clusters the query heads of each layer form; None where each attends for
        itself.
      selector: by what queries choose the chunks that they read, and which share of them; "all"
        where they read all.
      reads: how many of the chunks before them decoding rows have read, and how alike they chose,
        by layer, in calls where some row was to choose; None where there was none yet.
      tiers: what is behind the pool; None where nothing is.
      bytes_per_chunk: keys and values of a full chunk, all layers.
      bytes_per_window_chunk: the same of heads with windows, where those have chunks of their own;
        then those of `bytes_per_chunk` are of the other heads.
      window_chunks, window_chunks_in_use: all that heads with windows have then, and those that
        some sequence needs.
      most_window_chunks_in_use, most_window_chunks_unshared: when most other chunks were in use.
    """

    running: int = 0
    waiting: int = 0
    held: int = 0
    pinned: int = 0
    learned_prefixes: int = 0
    chunks_in_use: int = 0
    chunks_cached: int = 0
    chunks_free: int = 0
    submitted: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    not_finite: int = 0
    forks: int = 0
    preemptions: int = 0
    recoveries: int = 0
    evictions: int = 0
    prompts: PromptUse = field(default_factory=PromptUse)
    prefill_tokens: int = 0
    scored_tokens: int = 0
    weights_version: int = 0
    decode_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    host_seconds: float = 0.0
    compilations: int = 0
    compile_seconds: float = 0.0
    calls: int = 0
    plans: int = 0
    plans_shared: int = 0
    plan_seconds: float = 0.0
    plan: PlanSummary | None = None
    planned_reads: int = 0
    planned_reads_unshared: int = 0
    shared_tokens: int = 0
    most_chunks_in_use: int = 0
    most_chunks_unshared: int = 0
    codec: str = IDENTITY
    clusters: tuple[int, ...] | None = None
    selector: str = "all"
    reads: ReadCounts | None = None
    tiers: TierStats | None = None
    bytes_per_chunk: int = 0
    bytes_per_window_chunk: int = 0
    window_chunks: int = 0
    window_chunks_in_use: int = 0
    most_window_chunks_in_use: int = 0
    most_window_chunks_unshared: int = 0

    @property
    def kv_bytes_held(self) -> int:
        """The most that was in use at once."""
        return self._bytes(self.most_chunks_in_use, self.most_window_chunks_in_use)

    @property
    def kv_bytes_unshared(self) -> int:
        """What that would have been without sharing."""
        return self._bytes(self.most_chunks_unshared, self.most_window_chunks_unshared)

    def _bytes(self, chunks: int, window_chunks: int) -> int:
        return chunks * self.bytes_per_chunk + window_chunks * self.bytes_per_window_chunk

    @property
    def kv_bytes_saved(self) -> int:
        """What sharing saved when most was in use."""
        return self.kv_bytes_unshared - self.kv_bytes_held

    @property
    def host_microseconds_per_token(self) -> float:
        """The engine's own work for each decoded token."""
        return 1e6 * self.host_seconds / self.decode_tokens if self.decode_tokens else 0.0

    @property
    def plan_decision(self) -> str:
        """Whether rows share what they read, and why, when there was most to read."""
        if self.plan is None:
            return "nothing planned yet"
        return ("shared: " if self.plan.shared else "unshared: ") + self.plan.reason
