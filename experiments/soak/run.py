"""The work of `soak`: warm up, feed the engine, keep watch, and prove what must hold."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from experiments.cluster_option import chosen_clusters
from experiments.codecs import codec_for
from experiments.harness.compilations import Compilations, compilation_cache, count_compilations
from experiments.harness.environment import describe_environment, resident_bytes, usable_cpus
from experiments.harness.interrupts import deferred_interrupts
from experiments.harness.progress import PhaseDisplay, phase_display
from experiments.harness.results import ResultFolder
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.select_option import chosen_selector
from experiments.soak.account import Account
from experiments.soak.checks import (
    Difference,
    check_answers,
    check_chunks,
    check_compilations,
    check_memory,
    check_requests,
    invariant_broken,
    memory_growth,
    recheck,
)
from experiments.soak.config import Sizes, SoakConfig, sizes_for
from experiments.soak.driver import Driver
from experiments.soak.work import Arrivals, Workload
from experiments.tier_option import tier_errors, tiers_of
from jax_chunkattn import CacheConfig, Engine
from models import LoadedModel

WARM_UP_SHARE = 0.2
LONGEST_WARM_UP = 60.0
WAVES = 40  # in a run
PIN_SECONDS = 5.0  # or a twentieth of the run
DRAIN_SECONDS = 120.0  # at least; or as long as the run itself
COUNTED = ("decode_tokens", "prefill_tokens", "preemptions", "evictions", "compilations", "forks")
STANDING = ("running", "waiting", "held", "pinned", "chunks_in_use", "chunks_cached", "chunks_free")


@compilation_cache()
def soak(config: SoakConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`; what did not hold is in the summary's `failures`."""
    environment = describe_environment()
    options = LoadOptions("float32", config.seed, config.max_positions, chosen_heads(config))
    loaded = load_model(source, options)
    sizes = sizes_for(config, source, loaded.config.max_positions)
    folder.begin(environment, **asdict(sizes))

    codec = codec_for(config.codec, loaded.model)
    selector = chosen_selector(config, loaded.model, whole=0)
    clusters = chosen_clusters(config.clusters, loaded.model)
    how: Any = {"codec": codec, "selector": selector, "clusters": clusters}
    how |= tiers_of(config)

    def make_engine() -> Engine:
        with tier_errors(config):
            engine = bare_engine()
        engine.warm_up(threads=usable_cpus())
        return engine

    def bare_engine() -> Engine:
        return Engine(
            loaded.model,
            CacheConfig(sizes.num_chunks, config.chunk_size, **how),
            tokenizer=loaded.tokenizer,
            max_running=config.rows,
            steps_per_call=config.steps_per_call,
            prefill_tokens=config.prefill_tokens,
        )

    with phase_display() as display, deferred_interrupts() as check_interrupt:
        display.update("compile")
        with make_engine() as engine, count_compilations() as compiled:
            run = _Run(config, folder, loaded, sizes, engine, compiled)
            failures = list(run.all_phases(display, check_interrupt))
        display.update("recheck")
        differences = recheck(make_engine, run.account.sample)
    for difference in differences:
        folder.write_record({"kind": "difference", **_difference_record(difference)})
    summary = {
        "experiment": "soak",
        "model": config.model,
        "minutes": config.minutes,
        "seed": config.seed,
        "codec": config.codec,
        "select": config.select,
        "keep": config.keep,
        "dense_layers": None if selector is None else list(selector.dense_layers),
        **asdict(sizes),
        **run.summary(),
        "rechecked": {
            "requests": len(run.account.sample),
            "ties": sum(difference.is_tie for difference in differences),
        },
        "failures": [*failures, *check_answers(differences)],
        "environment": environment,
    }
    return finish(folder, summary)


class _Run:
    """One soak, from the warm engine to the empty one."""

    def __init__(
        self,
        config: SoakConfig,
        folder: ResultFolder,
        loaded: LoadedModel,
        sizes: Sizes,
        engine: Engine,
        compiled: Compilations,
    ):
        self._config = config
        self._folder = folder
        self._engine = engine
        self._compiled = compiled
        self._sizes = sizes
        self._random = np.random.default_rng(config.seed)
        self.account = Account(self._random, config.recheck)
        work = Workload(
            self._random,
            vocab_size=loaded.config.vocab_size,
            context_tokens=sizes.context_tokens,
            stop_strings=loaded.tokenizer is not None,
        )
        self._driver = Driver(engine, work, self.account, self._random, rows=config.rows)
        self._resident = array("q")  # after the warm-up
        self._began = time.perf_counter()
        self._phase = "warm-up"
        self._last_line = self._began
        self._last_counts = dict.fromkeys(COUNTED, 0)
        self._counts_when_warm = self._counts()
        self._broken: list[str] = []

    def all_phases(
        self, display: PhaseDisplay, check_interrupt: Callable[[], None]
    ) -> Iterator[str]:
        """Runs it to the end, and says what does not hold."""
        seconds = 60 * self._config.minutes
        warm_up = min(WARM_UP_SHARE * seconds, LONGEST_WARM_UP)

        def until(end: float, phase: str) -> Iterator[float]:
            """The time, again and again until the end, watched over and shown."""
            self._phase = phase
            begin = time.perf_counter()
            while (now := time.perf_counter()) < end:
                check_interrupt()
                display.update(phase, int(now - begin), int(end - begin) or 1)
                yield now
                self._watch(now)

        for _ in until(self._began + warm_up, "warm-up"):
            while len(self.account.live) < 2 * self._config.rows:
                self._driver.submit()
            self._driver.turn(self._began + warm_up)
        self._soak(until, self._began + seconds)
        self._driver.let_go()
        for _ in until(time.perf_counter() + max(DRAIN_SECONDS, seconds), "drain"):
            self._driver.turn(np.inf)
            self._driver.let_go()
            if not self.account.live and not self._engine.has_work:
                break
        self._write_line(time.perf_counter())
        yield from self._broken
        yield from check_memory(memory_growth(self._resident))
        yield from check_compilations(
            self._engine.stats.compilations - self._counts_when_warm["compilations"],
            self._compiled.compiled + self._compiled.from_cache,
        )
        yield from check_requests(self.account, self._engine.stats)
        yield from invariant_broken(self._engine)
        yield from check_chunks(self._engine, self._sizes.num_chunks)
        yield from invariant_broken(self._engine)

    def _soak(self, until: Callable[[float, str], Iterator[float]], end: float) -> None:
        """Requests in waves, around what the warm-up showed can be served."""
        now = time.perf_counter()
        capacity = max(1, self.account.ended.total()) / (now - self._began)
        self._driver.request_seconds = self._config.rows / capacity
        arrivals = Arrivals(
            self._random,
            now,
            capacity=capacity,
            wave_seconds=(end - now) / WAVES,
            burst=3 * self._config.rows,
        )
        pin_seconds = min(PIN_SECONDS, (end - now) / 20)
        next_pin = now
        renewals = deque(np.sort(self._random.uniform(now, end, self._config.new_weights)))
        for now in until(end, "soak"):
            for _ in range(arrivals.due(now)):
                self._driver.submit()
            if now >= next_pin:
                self._driver.pin_sometimes()
                next_pin = now + self._random.exponential(pin_seconds)
            if renewals and now >= renewals[0]:
                renewals.popleft()
                self._driver.renew_weights()
            next_renewal = renewals[0] if renewals else end
            self._driver.turn(min(end, next_pin, next_renewal, arrivals.next_change))

    def summary(self) -> dict[str, Any]:
        """What the run did."""
        stats = self._engine.stats
        seconds = time.perf_counter() - self._began
        growth = memory_growth(self._resident)
        return {
            "requests": self.account.started,
            "ended": dict(self.account.ended),
            "refused": self._driver.refused,
            "decode_tokens": stats.decode_tokens,
            "prefill_tokens": stats.prefill_tokens,
            "prompt_tokens_hit": stats.prompts.num_found,
            "seconds": round(seconds, 1),
            "decode_tokens_per_second": round(stats.decode_tokens / seconds, 1),
            "preemptions": stats.preemptions,
            "evictions": stats.evictions,
            "forks": stats.forks,
            "new_weights": stats.weights_version,
            "programs": self._counts_when_warm["compilations"],
            "resident_bytes": int(np.median(self._resident)) if self._resident else None,
            "memory_growth": None if growth is None else round(growth, 5),
        }

    def _watch(self, now: float) -> None:
        """A line and a check of the invariants, whenever an interval is over."""
        if now - self._last_line < self._config.interval:
            return
        self._write_line(now)
        for problem in invariant_broken(self._engine):
            if problem not in self._broken:
                self._broken.append(problem)

    def _write_line(self, now: float) -> None:
        resident = resident_bytes()
        if resident is not None and self._phase == "soak":
            self._resident.append(resident)
        counts, stats = self._counts(), self._engine.stats
        self._folder.write_record(
            {
                "kind": "interval",
                "phase": self._phase,
                "seconds": round(now - self._began, 3),
                "interval_seconds": round(now - self._last_line, 3),
                **{name: counts[name] - self._last_counts[name] for name in COUNTED},
                **{name: getattr(stats, name) for name in STANDING},
                "started": self.account.started,
                "ended": self.account.ended.total(),
                "resident_bytes": resident,
            }
        )
        self._last_counts = counts
        self._last_line = now

    def _counts(self) -> dict[str, int]:
        stats = self._engine.stats
        return {name: getattr(stats, name) for name in COUNTED}


def _difference_record(difference: Difference) -> dict[str, Any]:
    """Enough to look into it."""
    finished = difference.finished
    return {
        "prompt": list(finished.prompt),
        "params": repr(finished.params),
        "tokens": list(finished.tokens),
        "fresh_tokens": list(difference.again.tokens),
        "position": difference.position,
        "gap": difference.gap,
    }
