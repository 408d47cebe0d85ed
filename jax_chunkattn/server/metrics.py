"""What Prometheus reads: vLLM's names where they mean the same, and what only this engine knows.

vLLM's names are those of its `vllm/v1/metrics/loggers.py`; ours begin with `chunkattn:`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from jax_chunkattn.engine.residency import TierStats
from jax_chunkattn.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_SECONDS = (
    0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,
    7680,
)  # fmt: skip

FOUND = ("hit", "host", "disk", "copied")
MISSES = ("too_short", "new", "evicted", "window", "salt", "last")


class Metrics:
    """Everything that one server counts.

    Args:
      model: the name that is the label `model_name` of all.
    """

    def __init__(self, model: str):
        self.registry = CollectorRegistry()
        self._model = model
        self._stats = EngineStats()
        labels = ["model_name"]

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, about, labels, buckets=buckets, registry=self.registry)
            return made.labels(model)

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "Until the first token.", FIRST_TOKEN_SECONDS
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "Of a request, for each token behind the first.",
            TOKEN_SECONDS,
        )
        self._request = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to end.", REQUEST_SECONDS
        )
        self._ended = Counter(
            "vllm:request_success",
            "Answers that have ended, by why.",
            [*labels, "finished_reason"],
            registry=self.registry,
        )
        self._tokens = Counter(
            "vllm:generation_tokens", "Tokens of answers.", labels, registry=self.registry
        ).labels(model)
        self._refused = Counter(
            "chunkattn:requests_refused",
            "Requests that were answered with an error, by status.",
            [*labels, "status"],
            registry=self.registry,
        )
        self.registry.register(self)

    def began(self, seconds: float) -> None:
        """An answer has its first token, so long after it was asked for."""
        self._first_token.observe(seconds)

    def chose(self, tokens: int) -> None:
        """So many more tokens of an answer are there."""
        self._tokens.inc(tokens)

    def ended(self, reason: str, seconds: float, after_first: float, tokens: int) -> None:
        """An answer has ended, after so long, with so many tokens."""
        self._ended.labels(self._model, reason).inc()
        self._request.observe(seconds)
        if tokens > 1:
            self._per_token.observe(after_first / (tokens - 1))

    def refused(self, status: int) -> None:
        self._refused.labels(self._model, str(status)).inc()

    def text(self, stats: EngineStats) -> bytes:
        """As Prometheus reads it, with the engine's counters as given."""
        self._stats = stats
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's counters; called by the registry."""
        stats, use = self._stats, self._stats.prompts
        chunks = stats.chunks_in_use + stats.chunks_cached + stats.chunks_free
        yield from self._gauges(
            {
                "vllm:num_requests_running": ("Requests being computed.", stats.running),
                "vllm:num_requests_waiting": ("Requests queued.", stats.waiting),
                "vllm:kv_cache_usage_perc": (
                    "Part of the pool in use, from 0 to 1.",
                    stats.chunks_in_use / chunks if chunks else 0.0,
                ),
                "chunkattn:chunks_cached": ("Chunks that nobody uses.", stats.chunks_cached),
                "chunkattn:chunks_free": ("Chunks that hold nothing.", stats.chunks_free),
            }
        )
        yield from self._counters(
            {
                "vllm:prefix_cache_queries": ("Prompt tokens looked up.", use.num_tokens),
                "vllm:prefix_cache_hits": ("Of those, found.", use.num_found),
                "vllm:prompt_tokens": ("Prompt tokens.", use.num_tokens),
                "vllm:num_preemptions": ("Requests sent back to the queue.", stats.preemptions),
                "chunkattn:chunks_evicted": ("Cached chunks given up.", stats.evictions),
                "chunkattn:prefill_tokens": ("Prompt tokens computed.", stats.prefill_tokens),
                "chunkattn:scored_tokens": ("Given tokens scored.", stats.scored_tokens),
                "chunkattn:compilations": ("Programs compiled.", stats.compilations),
                "chunkattn:chunk_reads": (
                    "Chunks read by a step of each decode call, per layer and KV head.",
                    stats.planned_reads,
                ),
                "chunkattn:chunk_reads_saved": (
                    "Chunks that they would have read too if every row read its own.",
                    stats.planned_reads_unshared - stats.planned_reads,
                ),
            }
        )
        yield self._by_label(
            "chunkattn:prompt_tokens_missed",
            "Prompt tokens computed, by why they were not found.",
            "reason",
            {name: getattr(use, name) for name in MISSES},
        )
        yield self._by_label(
            "chunkattn:prompt_tokens_found",
            "Prompt tokens that were found, by where.",
            "place",
            {name: getattr(use, name) for name in FOUND},
        )
        yield from self._of_tiers(stats.tiers)
        yield self._by_label(
            "chunkattn:plans",
            "Decode plans, by what the planner decided.",
            "decision",
            {"shared": stats.plans_shared, "unshared": stats.plans - stats.plans_shared},
        )

    def _of_tiers(self, tiers: TierStats | None) -> Iterator[Metric]:
        """What is behind the pool, if something is."""
        if tiers is None:
            return
        gauge = GaugeMetricFamily(
            "chunkattn:tier_chunks", "Chunks behind the pool.", labels=["model_name", "tier"]
        )
        for tier, chunks in (("host", tiers.host_chunks), ("disk", tiers.disk_chunks)):
            gauge.add_metric([self._model, tier], chunks)
        yield gauge
        yield self._by_label(
            "chunkattn:tier_tokens_loaded",
            "Tokens brought back instead of computed.",
            "tier",
            {"host": tiers.loaded_from_host, "disk": tiers.loaded_from_disk},
        )
        yield self._by_label(
            "chunkattn:tier_failures",
            "Chunks that could not be moved, by reason.",
            "reason",
            {**tiers.failures, "disk too slow": tiers.not_written},
        )

    def _gauges(self, values: dict[str, tuple[str, float]]) -> Iterator[Metric]:
        for name, (about, value) in values.items():
            family = GaugeMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family

    def _counters(self, values: dict[str, tuple[str, float]]) -> Iterator[Metric]:
        for name, (about, value) in values.items():
            family = CounterMetricFamily(name, about, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family

    def _by_label(self, name: str, about: str, label: str, values: dict[str, int]) -> Metric:
        family = CounterMetricFamily(name, about, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._model, key], value)
        return family
