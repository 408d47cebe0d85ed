"""`python -m experiments soak`, small; and that it notices what must not be."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.cli import main
from experiments.harness.environment import resident_bytes
from experiments.harness.errors import UserError
from experiments.loading import parse_model
from experiments.soak import run as soaking_run
from experiments.soak import views as soak_views
from experiments.soak.account import Account, Finished, Tracked, problems_of
from experiments.soak.checks import (
    check_answers,
    check_chunks,
    check_compilations,
    check_memory,
    check_requests,
    invariant_broken,
    memory_growth,
    recheck,
    tie_of,
)
from experiments.soak.command import run
from experiments.soak.config import SoakConfig, check, sizes_for
from experiments.soak.work import Arrivals, Workload
from jax_chunkattn import SamplingParams
from tests.experiments.results import lines_in
from tests.jax_chunkattn.engine.engines import make_engine
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

SMALL: dict[str, Any] = {
    "minutes": 0.05,
    "model": "random:tiny",
    "rows": 2,
    "context_tokens": 96,
    "prefill_tokens": 32,
    "interval": 0.1,
    "recheck": 4,
}


# Whole runs.


@pytest.mark.slow
def test_a_soak_passes_and_leaves_its_lines_summary_and_picture(tmp_path: Path):
    summary = run(SoakConfig(**SMALL, output=tmp_path / "out"))
    assert summary["failures"] == []
    assert summary["requests"] == sum(summary["ended"].values()) > 20
    assert summary["evictions"] > 0 < summary["forks"]
    assert 0 < summary["new_weights"] <= 20
    assert summary["rechecked"]["requests"] == 4
    assert abs(summary["memory_growth"]) < 0.02
    lines = lines_in(tmp_path / "out")
    assert lines[0]["kind"] == "run"
    intervals = [line for line in lines if line["kind"] == "interval"]
    assert {"warm-up", "soak"} <= {line["phase"] for line in intervals}
    assert sum(line["decode_tokens"] for line in intervals) == summary["decode_tokens"]
    assert intervals[-1]["started"] == intervals[-1]["ended"] == summary["requests"]
    assert (tmp_path / "out" / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


@pytest.mark.thorough
@pytest.mark.slow
def test_a_soak_over_encoded_chunks_passes(tmp_path: Path):
    summary = run(SoakConfig(**SMALL, codec="int4", output=tmp_path / "out"))
    assert summary["failures"] == []
    assert summary["codec"] == "int4"
    assert summary["rechecked"]["requests"] == 4


@pytest.mark.slow
def test_a_soak_that_fails_says_so_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    sizes = itertools.count(1 << 30, 1 << 26)
    monkeypatch.setattr(soaking_run, "resident_bytes", lambda: next(sizes))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["soak", *options, "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("failed: resident memory grew by")
    assert "FAILED: resident memory" in captured.out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failures"]


# What is checked.


def test_memory_is_compared_from_the_first_quarter_to_the_last():
    assert memory_growth([100] * 7) is None
    assert memory_growth([100, 100, 500, 500, 500, 500, 103, 103]) == pytest.approx(0.03)
    assert memory_growth([100, 900, 100, *[100] * 6, 101, 900, 101]) == pytest.approx(0.01)
    assert list(check_memory(None)) == list(check_memory(0.019)) == list(check_memory(-0.5)) == []
    assert list(check_memory(0.03)) == ["resident memory grew by 3.0%, more than 2%"]
    assert (resident_bytes() or 1) > 0


def test_memory_that_was_not_checked_is_not_said_to_be_flat():
    [note] = soak_views._notes({"failures": [], "memory_growth": 0.01})
    assert note.startswith("All held: memory flat within 2%, nothing compiled")
    unchecked, note = soak_views._notes({"failures": [], "memory_growth": None})
    assert unchecked.startswith("resident memory was not checked")
    assert note.startswith("All held: nothing compiled")


def test_compilations_are_noticed_by_whoever_counts_them():
    assert list(check_compilations(0, 0)) == []
    assert "3 programs" in next(check_compilations(0, 3))
    assert "2 programs" in next(check_compilations(2, 0))


def test_a_lost_chunk_is_noticed():
    engine = make_engine(10)
    handle = engine.submit(token_tree((1, 20))[0], SamplingParams(3), hold=True)
    handle.result()
    assert "2 of 10 chunks are in use" in next(check_chunks(engine, 10))
    handle.release()
    assert list(check_chunks(engine, 10)) == []


def test_a_broken_invariant_is_noticed(monkeypatch: pytest.MonkeyPatch):
    engine = make_engine(10)
    assert list(invariant_broken(engine)) == []

    def broken() -> None:
        raise AssertionError("a chunk is lost")

    monkeypatch.setattr(engine, "check", broken)
    assert list(invariant_broken(engine)) == ["the engine's invariants are broken: a chunk is lost"]


def test_requests_that_never_end_or_are_miscounted_are_noticed():
    engine = make_engine(10)
    account = Account(np.random.default_rng(0), 4)
    handle = engine.submit(token_tree((1, 20))[0], SamplingParams(3))
    account.start(Tracked(handle))
    [never, miscounted] = check_requests(account, replace(engine.stats, submitted=2))
    assert never == "1 of 1 requests never ended"
    assert "'submitted': 2" in miscounted
    handle.result()
    assert [one.handle for one in account.collect()] == [handle]
    assert list(check_requests(account, engine.stats)) == []
    account.report("it went wrong")
    assert list(check_requests(account, engine.stats)) == [
        "1 requests went wrong, such as: it went wrong"
    ]


def ended(reason: str, tokens: tuple[int, ...], params: SamplingParams, **changes: Any) -> Any:
    """Stands for a handle: what it has streamed is all it has, unless changed."""
    streamed = changes.pop("streamed", tokens)
    fields = {"finish_reason": reason, "tokens": tokens, "params": params, "error": None}
    fields |= {"logprobs": tokens, "stream": lambda: [SimpleNamespace(tokens=streamed)]}
    return Tracked(SimpleNamespace(**(fields | changes)))  # pyright: ignore[reportArgumentType]


FOUR = SamplingParams(4)
STOPS = SamplingParams(4, stop_token_ids=(9,))


@pytest.mark.parametrize(
    ("tracked", "problem"),
    [
        (ended("length", (1, 2, 3, 4), FOUR), None),
        (ended("stop", (1, 9), STOPS), None),
        (ended("length", (1, 2, 3), FOUR), "ended by length at 3"),
        (ended("stop", (1, 2), STOPS), "does not stop it"),
        (ended("abort", (1, 2), FOUR), "nobody gave up"),
        (ended("error", (1,), FOUR, error=ValueError("odd")), "ValueError('odd')"),
        (ended("else", (1, 2), FOUR), "no known reason: 'else'"),
        (ended("length", (1, 2, 3, 4), FOUR, streamed=(1, 2, 4)), "streamed 3, not those"),
        (
            ended("length", (1, 2, 3, 4), replace(FOUR, logprobs=1), logprobs=(1, 2)),
            "4 tokens and 2 log-probabilities",
        ),
    ],
)
def test_what_is_wrong_with_a_request_is_said(tracked: Tracked, problem: str | None):
    found = list(problems_of(tracked))
    assert len(found) == (problem is not None)
    assert not problem or problem in found[0]


def test_an_answer_that_a_fresh_engine_does_not_give_is_noticed():
    [prompt] = token_tree((1, 20))
    right = tuple(greedy_without_cache(prompt, 6))
    wrong = (*right[:3], (right[3] + 1) % 256, *right[4:])
    six = SamplingParams(6)
    sample = [Finished(tuple(prompt), FOUR, right[:4]), Finished(tuple(prompt), six, wrong)]
    [difference] = recheck(lambda: make_engine(10), sample)
    assert (difference.position, difference.finished) == (3, sample[1])
    assert not difference.is_tie
    assert "1 greedy answers differ" in next(check_answers([difference]))
    tie = replace(difference, gap=1e-5)
    assert list(check_answers([tie])) == []
    assert not replace(difference, gap=0.2).is_tie
    assert replace(difference, gap=0.2, tie=tie_of("int4")).is_tie
    assert not replace(difference, gap=0.2, tie=tie_of("int8")).is_tie
    penalised = replace(FOUR, presence_penalty=1.0)  # which the gap does not show
    assert not replace(tie, finished=replace(sample[1], params=penalised)).is_tie


# What is asked of the engine.


def workload(seed: int = 0, **options: Any) -> Workload:
    settings = {"vocab_size": 256, "context_tokens": 128, "stop_strings": True, **options}
    return Workload(np.random.default_rng(seed), **settings)


def test_requests_fit_the_context_and_are_of_every_kind():
    work = workload()
    arrivals = [work.next() for _ in range(500)]
    assert arrivals[:50] == [one for w in [workload()] for one in (w.next() for _ in range(50))]
    for one in arrivals:
        assert len(one.prompt) >= 1
        assert len(one.prompt) + one.params.max_tokens <= 128
    kinds: dict[str, Callable[[Any], Any]] = {
        "aborted": lambda one: one.abort_after,
        "forked": lambda one: one.fork_after,
        "held": lambda one: one.hold,
        "salted": lambda one: one.salt,
        "sampled": lambda one: one.params.temperature,
        "penalised": lambda one: one.params.has_penalties,
        "stopped": lambda one: one.params.stop_token_ids,
        "of several": lambda one: one.params.n > 1,
        "logprobs": lambda one: one.params.logprobs,
        "long": lambda one: one.params.max_tokens > 32,
    }
    assert all(sum(bool(kind(one)) for one in arrivals) > 5 for kind in kinds.values())


def test_conversations_go_on():
    work = workload()
    work.remember([7] * 30, [8] * 10)
    goes_on = [one for one in (work.next() for _ in range(100)) if one.prompt[:30] == (7,) * 30]
    assert len(goes_on) > 10


def test_arrivals_come_in_waves_at_the_capacity_on_average():
    arrivals = Arrivals(np.random.default_rng(0), 0.0, capacity=50, wave_seconds=1, burst=0)
    counts = np.array([[arrivals.due(s + t / 100) for t in range(100)] for s in range(400)])
    in_second = counts.sum(axis=1)
    assert in_second.mean() == pytest.approx(50 * np.mean([0.0, 0.3, 0.9, 1.5]), rel=0.15)
    assert (in_second == 0).sum() > 20
    assert (in_second > 60).sum() > 20


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0.0}, "--minutes must be a number above 0"),
        ({"interval": float("inf")}, "--interval must be a number above 0"),
        ({"rows": 0}, "--rows must be at least 1, got 0"),
        ({"chunks": 0}, "--chunks must be at least 1"),
        ({"prefill_tokens": 64}, "--prefill-tokens must be 32, 128 or 512"),
        ({"context_tokens": 63}, "--context-tokens must be at least 64"),
        ({"seed": -1}, "--seed must be from 0"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(SoakConfig(**changes))


def test_sizes_that_do_not_fit_each_other_are_refused():
    source = parse_model("random:tiny")
    assert sizes_for(SoakConfig(), source, 2048).num_chunks == 16 * 32 // 5
    with pytest.raises(UserError, match="512 is above the 256 positions of random:tiny"):
        sizes_for(SoakConfig(context_tokens=512), source, 256)
    with pytest.raises(UserError, match="--chunks 40 is too small for contexts of 512 tokens"):
        sizes_for(SoakConfig(chunks=40), source, 2048)
