"""The work of `decode`: every point with its sides timed in turns, and the same tokens twice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from typing import Any

import numpy as np

from experiments.bare_loop import BareLoop, random_pool
from experiments.baselines import pool_of_copies
from experiments.decode.config import DecodeConfig
from experiments.decode.measures import Measured, Spread, measured
from experiments.decode.points import Point, points_of, varied
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.reading import Record
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.head_option import chosen_heads
from experiments.loading import LoadOptions, ModelSource, load_model
from experiments.prompts import PromptSet, make_prompts, read_prompts, read_system_prompt
from jax_chunkattn import CacheConfig, ChunkPool, Engine, SamplingParams, chunks_needed
from jax_chunkattn.device.backend import choose_backend
from jax_chunkattn.planning.prefill import CALL_TOKENS
from models import LoadedModel
from models.weights import num_parameters

CHECKED_PROMPTS = 4
CHECKED_SECTIONS = 2  # of the system prompt: its role, and the first facts
_SETTING = ("study", "model", "dtype", "rounds", "seed")


@compilation_cache()
def measure(config: DecodeConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the study into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    loaded = load_model(
        source,
        LoadOptions(config.dtype, config.seed, config.max_positions, chosen_heads(config)),
    )
    check_some_fit(config, loaded)
    folder.begin(environment)
    units = {
        name: functools.partial(_measure_point, config, loaded, point)
        for name, point in points_of(config).items()
    }
    if config.check_tokens:
        units = {"real prompts": functools.partial(_compare_tokens, config, loaded), **units}
    records = measure_units(folder, units, "decode")
    points = measured(config.study, [each for each in records if each["kind"] == "point"])
    summary = {
        "experiment": "decode",
        **{name: getattr(config, name) for name in _SETTING},
        "points": list(varied(config)),
        **_headline(points),
        "real_prompts": next((each for each in records if each["kind"] == "tokens"), None),
        "measured": [dataclasses.asdict(point) for point in points],
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _headline(points: list[Measured]) -> Record:
    """Of the last point at which all sides were measured, or else of the last."""
    last = next((one for one in reversed(points) if not one.skipped), points[-1])

    def middle(spread: Spread | None, digits: int) -> float | None:
        return round(spread.median, digits) if spread is not None else None

    return {
        "shared_tokens_per_second": middle(last.rates.get("shared"), 2),
        "unshared_tokens_per_second": middle(last.rates.get("unshared"), 2),
        "ratio": middle(last.ratio, 4),
    }


def check_some_fit(config: DecodeConfig, loaded: LoadedModel) -> None:
    """Raise `UserError` when no side of any point can be measured."""
    points = points_of(config)
    skips = [_skip_reasons(config, loaded, point) for point in points.values()]
    if all(len(skipped) == len(config.sides) for skipped in skips):
        reason = next(iter(skips[0].values()))
        raise UserError(f"nothing can be measured: at {next(iter(points))} {reason}")


def _measure_point(config: DecodeConfig, loaded: LoadedModel, point: Point) -> Record:
    """A point's record: seconds of every round until each completion, and what it chose."""
    skipped = _skip_reasons(config, loaded, point)
    loops = _loops(config, loaded, point, skipped)
    for loop in loops.values():
        loop.warm_up()
    chosen: dict[str, np.ndarray] = {}
    marks = [count // point.steps_per_call for count in point.completions]
    seconds: dict[str, list[list[float]]] = {side: [] for side in loops}
    for turn in range(config.rounds):
        for side in sorted(loops, reverse=turn % 2 == 1):
            ran = loops[side].run(marks)
            chosen[side] = ran.tokens
            seconds[side].append([round(each, 6) for each in ran.seconds])
    chunk_bytes = _cache(config, point, 1).bytes_per_chunk(loaded.model.cache_spec)
    held = {"shared": point.num_chunks, "unshared": point.num_chunks_unshared}
    return {
        "kind": "point",
        **dataclasses.asdict(point),
        "sides": {
            side: {
                "seconds": seconds[side],
                "kv_bytes": held[side] * chunk_bytes,
                "digest": _digest(chosen[side]),
                "plan": loop.plan_summary.reason,
            }
            for side, loop in loops.items()
        },
        "operations": _operations(loaded, point),
        "equal_rows": _equal_rows(*chosen.values()) if len(chosen) == 2 else None,
        "skipped": skipped,
    }


def _skip_reasons(config: DecodeConfig, loaded: LoadedModel, point: Point) -> dict[str, str]:
    """The sides that cannot be measured, and why."""
    most = loaded.config.max_positions
    if point.positions > most:
        reason = f"it takes {point.positions:,} positions, {config.model} has {most:,}"
        return dict.fromkeys(config.sides, reason)
    chunk_bytes = _cache(config, point, 1).bytes_per_chunk(loaded.model.cache_spec)
    limit = config.memory_gb * 1e9
    held = point.num_chunks * chunk_bytes
    if held > limit:
        reason = f"keys and values take {held / 1e9:.3g} GB, above --memory-gb {config.memory_gb:g}"
        return dict.fromkeys(config.sides, reason)
    copies = point.num_chunks_unshared * chunk_bytes
    if "unshared" in config.sides and held + copies > limit:
        return {
            "unshared": f"its copies take {copies / 1e9:.3g} GB beside {held / 1e9:.3g} GB, above "
            f"--memory-gb {config.memory_gb:g}"
        }
    return {}


def _loops(
    config: DecodeConfig, loaded: LoadedModel, point: Point, skipped: dict[str, str]
) -> dict[str, BareLoop]:
    """Each side over a pool of its own; what a row reads is the same on both."""
    sides = [side for side in config.sides if side not in skipped]
    if not sides:
        return {}
    spec, tables = loaded.model.cache_spec, point.tables()
    pool = random_pool(spec, point.num_chunks, point.chunk_size, config.dtype, config.seed)
    pools: dict[str, tuple[ChunkPool, list[list[int]]]] = {}
    if "unshared" in sides:
        *copies, copied = pool_of_copies(pool.keys, pool.values, tables, seed=config.seed)
        pools["unshared"] = ChunkPool(*copies), copied
    pools["shared"] = pool, tables
    cache = _cache(config, point, point.num_chunks)
    backend = choose_backend(spec, cache, implementation=config.implementation)
    return {
        side: BareLoop(
            loaded,
            *pools[side],
            [point.prompt_tokens] * point.rows,
            tokens=point.tokens,
            steps_per_call=point.steps_per_call,
            backend=backend,
            columns=point.columns,
        )
        for side in sides
    }


def _operations(loaded: LoadedModel, point: Point) -> dict[str, int]:
    """Of one token: in products with the weights, and in attention to a prompt before it."""
    config = loaded.config
    embeddings = config.vocab_size * config.hidden_size * (not config.tie_embeddings)
    heads = config.num_layers * config.num_heads * config.head_dim
    return {
        "products": 2 * (num_parameters(config) - embeddings),
        "attention": 4 * heads * point.prompt_tokens,
    }


def _cache(config: DecodeConfig, point: Point, num_chunks: int) -> CacheConfig:
    return CacheConfig(num_chunks, point.chunk_size, config.dtype)


def _compare_tokens(config: DecodeConfig, loaded: LoadedModel) -> Record:
    """The engine's answers to a few prompts with and without sharing."""
    prompts = _real_prompts(config, loaded)
    answers, plans = {}, {}
    for side, sharing in (("shared", True), ("unshared", False)):
        answers[side], plans[side] = _answer(config, loaded, prompts.tokens, sharing)
    return {
        "kind": "tokens",
        "prompts": len(prompts.tokens),
        "common_prefix": prompts.common_prefix,
        "note": prompts.note,
        "tokens": answers["shared"].size,
        "equal_tokens": int((answers["shared"] == answers["unshared"]).sum()),
        "plans": plans,
        "digests": {side: _digest(chosen) for side, chosen in answers.items()},
    }


def _real_prompts(config: DecodeConfig, loaded: LoadedModel) -> PromptSet:
    lines = read_prompts(None)[:CHECKED_PROMPTS]
    sections = read_system_prompt(None).split("\n# ")
    system_prompt = "\n# ".join(sections[:CHECKED_SECTIONS])
    return make_prompts(
        lines, system_prompt, loaded, max_tokens=config.check_tokens, seed=config.seed
    )


def _answer(
    config: DecodeConfig, loaded: LoadedModel, prompts, sharing: bool
) -> tuple[np.ndarray, str]:
    """Greedy tokens [T, B], and what the planner decided.

    The pool is as large whether it is shared or not, so that both run the same programs.
    """
    most = chunks_needed(prompts, config.check_tokens, chunk_size=config.chunk_size, sharing=False)
    with Engine(
        loaded.model,
        CacheConfig(most, config.chunk_size, config.dtype),
        max_running=len(prompts),
        sharing=sharing,
        implementation=config.implementation,
        prefill_tokens=CALL_TOKENS[0],  # one size of call: little to compile, and few tokens
        prefill_first=True,
    ) as engine:
        params = SamplingParams(config.check_tokens, ignore_eos=True)
        outputs = sorted(engine.generate(prompts, params), key=lambda output: output.index)
        tokens = [output.samples[0].tokens for output in outputs]
        return np.asarray(tokens, np.int32).T, engine.stats.plan_decision


def _equal_rows(one: np.ndarray, other: np.ndarray) -> int:
    return int((one == other).all(axis=0).sum())


def _digest(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, np.int32).tobytes()).hexdigest()[:16]
