"""What an engine takes on this machine, for the device model: prompts, decode steps, and a burst of
requests that the model is checked with."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.cluster.config import ClusterConfig
from experiments.cluster.device_model import DeviceModel
from experiments.cluster.replica import Replica, Served
from experiments.cluster.workload import Arrival
from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from jax_chunkattn import CacheConfig, Engine, RequestHandle, SamplingParams
from jax_chunkattn.replicas.router import Routed
from models import LoadedModel

DECODED = 96  # tokens of each row that is timed
OWN_TOKENS = 64  # of each row, behind what it may share
REPEATS = 5  # of which the least counts: what else a machine does only adds
BURST, FAMILIES, BURST_TOKENS = 24, 6, 100  # requests of the check, of so many prefixes


class Measured:
    """Times an engine. One is made, with room for the most that is measured."""

    def __init__(self, config: ClusterConfig, loaded: LoadedModel):
        """Raises UserError when the model has too few positions, or memory does not suffice."""
        context, rows = max(config.contexts), max(config.decode_points)
        longest = max(*config.prefill_points, context + OWN_TOKENS, context + BURST_TOKENS)
        if longest + DECODED > loaded.config.max_positions:
            raise UserError(
                f"--prefill-points and --contexts need {longest + DECODED} positions, --model "
                f"{config.model} has {loaded.config.max_positions:,}"
            )
        most = max(
            longest + DECODED,
            rows * (context + OWN_TOKENS + DECODED),
            FAMILIES * context + BURST * (BURST_TOKENS + DECODED),
        )
        self._num_chunks = -(-most // config.chunk_size) + 2 * max(rows, BURST)
        self._config = config
        self._vocabulary = loaded.model.vocab_size
        self._random = np.random.default_rng(config.seed)
        self._max_running = max(rows, config.max_running)
        self._engine = Engine(
            loaded.model,
            CacheConfig(num_chunks=self._num_chunks, chunk_size=config.chunk_size),
            max_running=self._max_running,
        )

    def prefill(self, tokens: int) -> Record:
        """A prompt that finds nothing, alone, until its first token."""
        prompt = self._prompt(tokens)

        def run() -> float:
            self._engine.reset()
            began = time.perf_counter()
            self._engine.submit(prompt, SamplingParams(1)).result()
            return time.perf_counter() - began

        return {"kind": "prefill", "tokens": tokens, "seconds": self._least(run)}

    def decode(self, rows: int, context: int, shared: bool) -> Record:
        """A step of rows whose prompts are cached: behind one prefix, or each behind its own."""
        self._engine.reset()
        prefix = self._prompt(context)
        prompts = [
            (prefix if shared else self._prompt(context)) + self._prompt(OWN_TOKENS)
            for _ in range(rows)
        ]
        list(self._engine.generate(prompts, SamplingParams(1)))
        own = OWN_TOKENS + DECODED // 2
        return {
            "kind": "decode",
            "rows": rows,
            "context": context,
            "shared": shared,
            "distinct": context + rows * own if shared else rows * (context + own),
            "read": rows * (context + own),
            "seconds": self._least(lambda: self._step_seconds(prompts)),
        }

    def _step_seconds(self, prompts: list[list[int]]) -> float:
        """From when all have begun until the first has ended, by what they decoded meanwhile."""
        engine = self._engine
        handles = [engine.submit(prompt, SamplingParams(DECODED)) for prompt in prompts]
        while min(map(_chosen, handles)) == 0:
            engine.step()
        began, before = time.perf_counter(), sum(map(_chosen, handles))
        while not any(handle.done for handle in handles):
            engine.step()
        seconds, after = time.perf_counter() - began, sum(map(_chosen, handles))
        engine.run()
        return seconds * len(prompts) / (after - before)

    def _least(self, run: Callable[[], float]) -> float:
        """The least of several times, those left out in which something was compiled."""
        seconds: list[float] = []
        while len(seconds) < REPEATS:
            before = self._engine.stats.compilations
            one = run()
            if self._engine.stats.compilations == before:
                seconds.append(one)
        return float(f"{min(seconds):.6g}")

    def burst(self, device: DeviceModel) -> Record:
        """Requests that all come at once: what an engine takes, and what the model says."""
        context = max(self._config.contexts)
        families = [self._prompt(context) for _ in range(FAMILIES)]
        prompts = [families[one % FAMILIES] + self._prompt(BURST_TOKENS) for one in range(BURST)]
        took: list[list[float]] = []

        def run() -> float:
            self._engine.reset()
            took.append(self._first_tokens(prompts))
            return took[-1][-1]

        seconds = self._least(run)
        *firsts, _ = min(took, key=lambda one: one[-1])
        modelled = self._modelled(device, prompts)
        return {
            "kind": "burst",
            "requests": BURST,
            "prompt_tokens": sum(map(len, prompts)),
            "seconds": seconds,
            "seconds_modelled": _rounded(max(one.finished for one in modelled)),
            "first_token": _rounded(statistics.fmean(firsts)),
            "first_token_modelled": _rounded(statistics.fmean(one.first_token for one in modelled)),
        }

    def _first_tokens(self, prompts: list[list[int]]) -> list[float]:
        """Seconds until each has its first token, and until all have ended."""
        firsts: list[float | None] = [None] * len(prompts)
        began = time.perf_counter()
        handles = [self._engine.submit(prompt, SamplingParams(DECODED)) for prompt in prompts]
        while self._engine.step():
            now = time.perf_counter() - began
            firsts = [
                now if first is None and handle.tokens else first
                for first, handle in zip(firsts, handles, strict=True)
            ]
        return [first or 0.0 for first in firsts] + [time.perf_counter() - began]

    def _modelled(self, device: DeviceModel, prompts: list[list[int]]) -> list[Served]:
        size = self._config.chunk_size
        replica = Replica(device, self._num_chunks, size, self._max_running)
        served = []
        for prompt in prompts:
            arrival = Arrival(0.0, len(prompt), DECODED, ())
            tokens = np.array([*prompt, *range(DECODED)], np.int32)
            routed = Routed("", len(prompt), 0, [], 0, 0.0, 0.0)
            served.append(Served(arrival, routed, tokens))
            replica.submit(served[-1], 0.0)
        while replica.turn is not None:
            replica.end_turn()
        return served

    def _prompt(self, tokens: int) -> list[int]:
        return self._random.integers(0, self._vocabulary, tokens).tolist()


def points_of(config: ClusterConfig) -> dict[str, Any]:
    """What is measured, by name: a method of `Measured` and its arguments."""
    points: dict[str, Any] = {
        f"prefill {tokens}": ("prefill", {"tokens": tokens}) for tokens in config.prefill_points
    }
    for rows, context in itertools.product(config.decode_points, config.contexts):
        for shared in (True, False) if rows > 1 else (True,):
            name = f"decode {rows} x {context}, {'shared' if shared else 'unshared'}"
            points[name] = ("decode", {"rows": rows, "context": context, "shared": shared})
    return points


def _rounded(seconds: float) -> float:
    return round(seconds, 4)


def _chosen(handle: RequestHandle) -> int:
    return len(handle.tokens)
