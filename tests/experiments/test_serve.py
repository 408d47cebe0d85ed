"""`python -m experiments serve`, small."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.cli import DEBUG_VARIABLE, main
from experiments.harness.errors import UserError
from experiments.serve import rounds as serving_rounds
from experiments.serve.command import run
from experiments.serve.config import ServeConfig, check
from experiments.serve.figures import serving_figure
from experiments.serve.ideal import ideal_hits
from experiments.serve.measures import ratios, spread
from experiments.serve.replay import Served, replay
from experiments.serve.views import tables
from experiments.serve.workload import ServedRequest, made_up_workload, trace_workload
from experiments.trace import TraceRequest, read_requests
from tests.experiments.results import lines_in, make_result, summary_in, text_of

# A block becomes a chunk of 16 tokens.
SMALL: dict[str, Any] = {
    "scale": 32,
    "max_running": 16,
    "pool_chunks": 200,
    "steps_per_call": 3,
    "prefill_tokens": 32,
    "every": 1,
    "warm_up": 0.0,
}
REQUESTS = [
    (0, 1024, 96, [0, 1]),
    (500, 1536, 160, [0, 1, 2]),
    (500, 1600, 32, [0, 1, 3, 4]),
    (1000, 1024, 128, [7, 8]),
    (2000, 1024, 96, [0, 1]),
]
NOWHERE_ELSE = {"host": 0, "disk": 0, "copied": 0, "window": 0}
FOUND = {"hit": 32 + 32 + 31, "too_short": 2, "new": 96, "last": 1, **NOWHERE_ELSE}
# And 96 tokens seen before.
SEEN = {"hit": 0, "too_short": 2, "new": 96, "last": 0, **NOWHERE_ELSE}


def line(timestamp: Any, input_length: Any, output_length: Any, hash_ids: Any) -> str:
    names = ("timestamp", "input_length", "output_length", "hash_ids")
    values = (timestamp, input_length, output_length, hash_ids)
    return json.dumps(dict(zip(names, values, strict=True))) + "\n"


def write_trace(path: Path, *requests: tuple[Any, ...]) -> Path:
    path.write_text("".join(line(*request) for request in requests))
    return path


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a config on the five requests above, unless another trace is named."""
    trace = write_trace(tmp_path / "trace.jsonl", *REQUESTS)
    settings = {**SMALL, "trace": trace, "requests": len(REQUESTS), "output": tmp_path / "out"}
    return lambda **changes: run(ServeConfig(**{**settings, **changes}))


def sides_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {record["side"]: record for record in summary["sides"]}


def requests_in(folder: Path) -> list[dict[str, Any]]:
    return [record for record in lines_in(folder) if record["kind"] == "request"]


# Whole runs.


@pytest.mark.slow
def test_encoded_chunks_hit_alike(serve: Any, tmp_path: Path):
    exact, coded = (
        serve(codec=codec, sides=("shared",), closed=1, output=tmp_path / codec)
        for codec in ("identity", "int4")
    )
    assert coded["codec"] == "int4"
    found, again = (summary["sides"][0]["prompt_tokens"] for summary in (exact, coded))
    assert found["hit"] > 0
    # What a query's own chunk has in common with another is computed again.
    assert (found["hit"], found["last"]) == (95, 1)
    assert (again["hit"], again["last"]) == (80, 16)


@pytest.mark.slow
def test_hits_are_counted_exactly_one_request_at_a_time(serve: Any, tmp_path: Path):
    summary = serve(closed=1)
    sides = sides_of(summary)
    use = {side: record["prompt_tokens"] for side, record in sides.items()}
    assert use["shared"] == {"total": 194, "evicted": 0, "salt": 0, **FOUND}
    assert use["free-at-once"] == {"total": 194, "evicted": 96, "salt": 0, **SEEN}
    assert use["unshared"] == {"total": 194, "evicted": 0, "salt": 96, **SEEN}
    for record in sides.values():
        assert record["hit_rate_ideal"] == record["chunk_hit_rate_ideal"] == round(95 / 194, 4)
        assert record["peak_running"] <= 1
        assert (record["evictions"], record["preemptions"]) == (0, 0)
    assert sides["shared"]["hit_rate"] == round(95 / 194, 4)
    assert sides["free-at-once"]["hit_rate"] == sides["unshared"]["hit_rate"] == 0
    assert summary["trace_block_hit_rate_ideal"] == round(6 / 13, 4)
    hits = [one["hit_tokens"] for one in requests_in(tmp_path / "out")]
    assert hits == [0, 32, 32, 0, 31, *[0] * 10]


@pytest.mark.slow
def test_all_sides_give_the_same_answers(serve: Any, tmp_path: Path):
    sides = sides_of(serve(closed=5, prefill_tokens=512))
    assert sides["shared"]["equal_answers"] is None
    assert sides["free-at-once"]["equal_answers"] == sides["unshared"]["equal_answers"] == 5
    # Those that run at the same time share, even if nothing is kept.
    assert sides["free-at-once"]["prompt_tokens"]["hit"] == 95
    assert sides["shared"]["peak_running"] > 1
    assert sides["shared"]["peak_kv_bytes"] < sides["unshared"]["peak_kv_bytes"]
    lengths = [
        (one["index"], one["prompt_tokens"], len(one["tokens"]))
        for one in requests_in(tmp_path / "out")
    ]
    expected = [(0, 32, 3), (1, 48, 5), (2, 50, 1), (3, 32, 4), (4, 32, 3)]
    assert sorted(lengths) == sorted(expected * 3)


@pytest.mark.slow
def test_requests_come_in_time(serve: Any, tmp_path: Path):
    summary = serve(speed=10.0, sides=("shared",))
    requests = sorted(requests_in(tmp_path / "out"), key=lambda one: one["index"])
    assert [one["arrival"] for one in requests] == [0.0, 0.05, 0.05, 0.1, 0.2]
    assert all(one["arrival"] < one["first_token"] <= one["end"] for one in requests)
    assert summary["arrivals"] == "10 seconds of the trace in a second"
    [record] = summary["sides"]
    assert summary["ratios"]["shared"]["requests_per_second"]["median"] == 1.0
    waits = sorted(one["first_token"] - one["arrival"] for one in requests)
    assert record["time_to_first_token"]["p50"] == pytest.approx(waits[2], abs=2e-6)


@pytest.mark.slow
def test_a_run_leaves_records_summary_and_picture(serve: Any, tmp_path: Path, capsys: Any):
    summary = serve(closed=5, sides=("unshared", "shared"), warm_up=5.0)
    folder = tmp_path / "out"
    kinds = [record["kind"] for record in lines_in(folder)]
    assert kinds == ["run", *["request"] * 5, "side", *["request"] * 5, "side"]
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for picture in ("picture.png", "picture.svg"):
        assert (folder / picture).stat().st_size > 10_000
    assert summary["ratios_to"] == "unshared"
    assert summary["ratios"]["unshared"]["time_to_first_token_mean"]["median"] == 1.0
    assert summary["sides"][1]["engine"]["compilations"] == 0  # the warm-up had them
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "a block of 512 tokens became 16" in captured.out
    assert captured.out.rstrip().endswith(f"results: {folder}")


def test_rounds_are_told_apart(serve: Any, tmp_path: Path):
    summary = serve(closed=5, sides=("shared", "unshared"), rounds=2)
    runs = [record for record in lines_in(tmp_path / "out") if record["kind"] == "side"]
    order = [("shared", 0), ("unshared", 0), ("unshared", 1), ("shared", 1)]
    assert [(run["side"], run["round"]) for run in runs] == order
    assert [run["equal_answers"] for run in runs] == [None, 5, 5, 5]
    assert len(requests_in(tmp_path / "out")) == 20
    means = [run["normalised_latency"]["mean"] for run in runs if run["side"] == "shared"]
    assert summary["sides"][0]["normalised_latency"]["mean"] == min(means)
    ratio = summary["ratios"]["shared"]["normalised_latency_mean"]
    assert ratio["least"] <= ratio["median"] <= ratio["most"]


@pytest.mark.slow
def test_made_up_requests_come_at_a_rate(tmp_path: Path):
    config = ServeConfig(**dict(SMALL, every=20), requests=6, rate=50.0, output=tmp_path / "out")
    sides = sides_of(run(config))
    # 64 tokens of system prompt, two of the request's own.
    assert sides["shared"]["prompt_tokens"]["hit"] == 5 * 64
    assert sides["unshared"]["hit_rate"] == 0
    assert sides["unshared"]["equal_answers"] == 6


def test_a_small_pool_evicts(serve: Any, tmp_path: Path):
    # Eight prompts of two chunks, of which a pool of ten keeps the last ones only.
    prompts = [[2 * number, 2 * number + 1] for number in (0, 1, 2, 3, 4, 5, 0, 5)]
    trace = write_trace(tmp_path / "more.jsonl", *((0, 1024, 32, ids) for ids in prompts))
    summary = serve(trace=trace, requests=8, closed=1, pool_chunks=10, sides=("shared",))
    [record] = summary["sides"]
    assert record["prompt_tokens"]["hit"] == 31
    assert record["prompt_tokens"]["evicted"] == 32
    assert record["evictions"] == 4
    assert record["chunk_hit_rate_ideal"] == round(62 / 256, 4)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_the_last_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    write_trace(tmp_path / "trace.jsonl", *REQUESTS)
    original = serving_rounds.request_record

    def interrupting(side: str, number: int, one: Served) -> dict[str, Any]:
        if (side, one.index) == ("free-at-once", 1):
            signal.raise_signal(signal.SIGINT)
        return original(side, number, one)

    monkeypatch.setattr(serving_rounds, "request_record", interrupting)
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    folder = tmp_path / "out"
    command = [
        *("serve", "--trace", str(tmp_path / "trace.jsonl"), "--requests", "5", "--every", "1"),
        *("--max-running", "16", "--pool-chunks", "200", "--steps-per-call", "3"),
        *("--warm-up", "0", "--closed", "1", "--output", str(folder)),
    ]
    assert main(command) == 130
    lines = lines_in(folder)
    assert [line.get("index") for line in lines] == [None, 0, 1, 2, 3, 4, None, 0, 1]
    assert capsys.readouterr().err == (
        f"interrupted: the results so far (8 lines) are in {folder}/results.jsonl; "
        "the same command goes on from there\n"
    )

    monkeypatch.setattr(serving_rounds, "request_record", original)
    assert main(command) == 0
    assert "where 1 of 3 are measured" in capsys.readouterr().err
    assert lines_in(folder)[:7] == lines[:7]
    sides = sides_of(summary_in(folder))
    assert sides["shared"] == lines[6]
    assert sides["unshared"]["equal_answers"] == sides["free-at-once"]["equal_answers"] == 5
    assert len(requests_in(folder)) == 15


# The clock and errors, on an engine that only says what it does.


class FakeEngine:
    """Serves a request a turn, all of its tokens at once; compiles for 0.4 s in the first turn."""

    def __init__(self, fail: bool = False) -> None:
        self.stats = SimpleNamespace(
            reads=None,
            compile_seconds=1.0,
            running=0,
            waiting=0,
            failed=0,
            prompts=SimpleNamespace(num_tokens=0, num_found=0),
        )
        self.fail = fail
        self.queue: list[tuple[Any, Any, Any]] = []

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def submit(self, prompt: Sequence[int], params: Any, *, on_event: Any) -> Any:
        handle = SimpleNamespace(done=False, tokens=(1,) * params.max_tokens, result=self.raise_it)
        self.queue.append((len(prompt), handle, on_event))
        return handle

    def raise_it(self) -> None:
        raise RuntimeError("the device is gone")

    def step(self) -> None:
        if self.stats.compile_seconds == 1.0:
            time.sleep(0.4)
            self.stats.compile_seconds += 0.4
        length, handle, on_event = self.queue.pop(0)
        self.stats.prompts.num_tokens += length
        self.stats.prompts.num_found += 1
        handle.done = True
        if self.fail:
            self.stats.failed += 1
        else:
            on_event(SimpleNamespace(finish_reason=None))
            on_event(SimpleNamespace(finish_reason="length"))


def test_the_clock_stands_still_while_compiling():
    engine: Any = FakeEngine()
    requests = [ServedRequest(0.0, (1, 2), 3), ServedRequest(0.03, (1, 2), 3)]
    replayed = replay(engine, requests)
    assert [one.index for one in replayed.served] == [0, 1]
    assert all(one.time_to_first_token < 0.3 for one in replayed.served)
    assert replayed.served[1].first_token >= 0.03
    assert [one.hit_tokens for one in replayed.served] == [1, 1]


def test_in_a_closed_loop_the_next_comes_when_one_is_done():
    engine: Any = FakeEngine()
    waiting = []
    requests = [ServedRequest(0.0, (1,), 1)] * 5
    replay(engine, requests, at_once=2, on_turn=lambda done: waiting.append(len(engine.queue)))
    assert waiting == [1, 1, 1, 1, 0]


def test_a_replay_may_be_cut_short():
    engine: Any = FakeEngine()
    requests = [ServedRequest(0.0, (1,), 1), ServedRequest(100.0, (1,), 1)]
    assert len(replay(engine, requests, for_seconds=0.4).served) == 1


def test_a_request_that_fails_ends_the_run():
    engine: Any = FakeEngine(fail=True)
    with pytest.raises(RuntimeError, match="the device is gone"):
        replay(engine, [ServedRequest(0.0, (1,), 1)])


# Requests.


def workload_of(*requests: TraceRequest, max_positions: int = 1024, **changes: Any) -> Any:
    config = ServeConfig(**{**SMALL, "trace": Path("trace"), **changes})
    return trace_workload(requests, config, vocab_size=256, max_positions=max_positions)


def test_equal_ids_make_equal_tokens_and_lengths_are_scaled_up():
    first = TraceRequest(3.0, 600, 33, (5, 6))
    second = TraceRequest(4.5, 1024, 1, (5, 7))
    workload = workload_of(first, second, speed=3.0)
    one, other = workload.requests
    assert (len(one.prompt), one.output_tokens) == (19, 2)
    assert (len(other.prompt), other.output_tokens) == (32, 1)
    assert one.prompt[:16] == other.prompt[:16]
    assert one.prompt[16:] != other.prompt[16:19]
    assert (one.due, other.due) == (0.0, 0.5)
    assert workload_of(first, second, speed=3.0) == workload
    assert workload_of(first, second, seed=1).requests[0].prompt != one.prompt


def test_what_the_model_has_no_positions_for_is_cut_and_counted():
    blocks = tuple(range(8))
    workload = workload_of(
        TraceRequest(0.0, 4096, 3200, blocks),  # 128 and 100 tokens
        TraceRequest(0.0, 4096, 320, blocks),  # 128 and 10
        TraceRequest(0.0, 1024, 1024, blocks[:2]),  # 32 and 32: fits exactly
        max_positions=64,
    )
    lengths = [(len(request.prompt), request.output_tokens) for request in workload.requests]
    assert lengths == [(32, 32), (54, 10), (32, 32)]
    assert (workload.cut_prompts, workload.cut_outputs) == (2, 1)
    assert workload.requests[1].prompt[:32] == workload.requests[0].prompt
    assert (workload.prompt_tokens, workload.output_tokens) == (118, 74)


def test_made_up_requests_take_turns_with_system_prompts():
    config = ServeConfig(**SMALL, requests=500, rate=20.0, system_prompts=2)
    requests = made_up_workload(config, vocab_size=256, max_positions=1024).requests
    prompts = [request.prompt for request in requests]
    assert {len(prompt) for prompt in prompts} == {66}
    assert prompts[0][:64] == prompts[2][:64] != prompts[1][:64]
    assert len({prompt[:64] for prompt in prompts}) == 2
    dues = [request.due for request in requests]
    assert dues[0] == 0.0
    assert dues == sorted(dues)
    assert dues[-1] / 499 == pytest.approx(1 / 20, rel=0.15)  # the gaps' mean


def test_the_ideal_is_the_longest_prefix_of_any_earlier_prompt():
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 2, random.integers(1, 12)).tolist() for _ in range(60)]

    def common(one: list[int], other: list[int]) -> int:
        pairs = zip(one, other, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    tokens = in_chunks = 0
    for index, prompt in enumerate(prompts):
        most = max((common(prompt, other) for other in prompts[:index]), default=0)
        tokens += min(most, len(prompt) - 1)
        in_chunks += min(most // 3 * 3, len(prompt) - 1)
    ideal = ideal_hits(prompts, 3)
    assert (ideal.tokens, ideal.tokens_in_chunks) == (tokens, in_chunks)
    assert ideal.prompt_tokens == sum(map(len, prompts))
    assert ideal_hits([[256], [1]], 1).tokens == 0  # bytes in common are no tokens


# Traces.


def test_conversations_are_kept_whole(tmp_path: Path):
    ids = [[0, 1], [0, 2], [0, 1, 3], [0, 4], [0, 2, 5], [0, 1, 3, 6]]
    path = write_trace(tmp_path / "t", *((i, 512 * len(b), 1, b) for i, b in enumerate(ids)))
    kept = read_requests(path, 4, every=2)
    assert [list(request.blocks) for request in kept] == [ids[0], ids[2], ids[3], ids[5]]
    assert [request.seconds for request in kept] == pytest.approx([0.0, 0.002, 0.003, 0.005])
    assert len(read_requests(path, 3)) == 3
    with pytest.raises(
        UserError, match=r"--requests 5: --trace .* has 4 when one conversation in 2"
    ):
        read_requests(path, 5, every=2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("no json\n", "JSONDecodeError"),
        ("[1]\n", "TypeError"),
        ("{}\n", "KeyError.*timestamp"),
        (line(5, 1024, 1, [0, 1]), "timestamp must be a number of milliseconds from 10 up, got 5"),
        (line("now", 1024, 1, [0, 1]), "TypeError"),
        ('{"timestamp": NaN}\n', "timestamp must be a number"),
        (line(20, 0, 1, []), "input_length must be a whole number from 1 up, got 0"),
        (line(20, 1024, 1.5, [0, 1]), "output_length must be a whole number from 1 up, got 1.5"),
        (line(20, 1024, True, [0, 1]), "output_length must be .* got True"),
        (line(20, 1024, 1, [0, -1]), "hash_ids must be a list of ids from 0 up"),
        (line(20, 1024, 1, 7), "hash_ids must be a list of ids from 0 up, got 7"),
        (line(20, 1025, 1, [0, 1]), "input_length 1025 takes 3 blocks of 512, hash_ids has 2"),
    ],
)
def test_a_line_that_is_no_request_is_named(tmp_path: Path, bad: str, message: str):
    path = write_trace(tmp_path / "trace", (10, 1024, 1, [0, 1]))
    path.write_text(path.read_text() + bad)
    with pytest.raises(UserError, match=f"line 2: not a request of such a trace: .*{message}"):
        read_requests(path, 2)


# Measures.


def served(index: int, arrival: float, first: float, end: float, tokens: int) -> Served:
    return Served(index, arrival, first, end, 10, None, (0,) * tokens)


def test_times_of_a_request():
    one = served(0, arrival=1.0, first=2.0, end=4.0, tokens=5)
    assert one.time_to_first_token == 1.0
    assert one.seconds_per_output_token == 0.5
    assert one.normalised_latency == 0.6
    assert served(0, 1.0, 2.0, 2.0, tokens=1).seconds_per_output_token is None


def fake_record(side: str, factor: float = 1.0, **changes: Any) -> dict[str, Any]:
    times = {"mean": factor, "p50": 2 * factor, "p90": 3 * factor, "p99": 4 * factor}
    reasons = dict.fromkeys(
        ("hit", "copied", "too_short", "new", "evicted", "window", "salt", "last"), 7
    )
    return {
        "side": side,
        "requests": 2,
        "hit_rate": 0.3,
        "hit_rate_ideal": 0.4,
        "chunk_hit_rate": 0.25,
        "chunk_hit_rate_ideal": 0.35,
        "prompt_tokens": reasons,
        "time_to_first_token": times,
        "seconds_per_output_token": times,
        "normalised_latency": times,
        "requests_per_second": 2.0 / factor,
        "output_tokens_per_second": 20.0 / factor,
        "peak_kv_bytes": 1 << 20,
        "peak_running": 3,
        "evictions": 1234,
        "preemptions": 0,
        "engine": {"compile_seconds": 1.5, "prefill_tokens": 4321},
        "equal_answers": 1,
    } | changes


def test_ratios_are_to_the_base():
    base = fake_record("unshared")
    halves = ratios(fake_record("shared", 0.5), base)
    assert halves["time_to_first_token_p50"] == 0.5
    assert halves["requests_per_second"] == 2.0
    assert halves["peak_kv_bytes"] == 1.0
    nothing = ratios(fake_record("shared", seconds_per_output_token=None), base)
    assert nothing["seconds_per_output_token_p50"] is None


def test_ratios_of_rounds_have_a_median():
    rounds = [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": None}, {"a": 2.0, "b": 1.0}]
    assert spread(rounds) == {"a": {"median": 2.0, "least": 1.0, "most": 3.0}, "b": None}


def test_report_says_what_was_found_cut_and_scaled():
    base = fake_record("unshared", seconds_per_output_token=None, equal_answers=None)
    summary = {
        "sides": [fake_record("shared"), base],
        "num_requests": 2,
        "requests": "trace",
        "arrivals": "2 requests at once",
        "rounds": 3,
        "ratios_to": "unshared",
        "ratios": {"shared": spread([ratios(fake_record("shared", f), base) for f in (0.5, 1, 3)])},
        "scaling": "1 token stands for 32",
        "cut_prompts": 1,
        "cut_outputs": 0,
        "at_once": 2,
    }
    text = text_of(tables(make_result("serve", summary=summary)))
    for expected in (
        "prompt tokens found (40.0% without bound)",
        "25.0%",
        "1,234",
        "4,321",
        "1.0 MiB",
        "Scaling: 1 token stands for 32; 1 of 2 prompts cut to fit the model.",
        "Answers of shared equal to those of the first run: 1 of 2.",
        "Of each side's rounds the one with the median latency is shown.",
        "Ratios to unshared, median (least..most) of 3 rounds",
        "1.00 (0.50..3.00)",
        "Compiled during the measurements, not counted: 3.0 s.",
    ):
        assert expected in text


def test_figure_shows_distributions_and_hit_rates():
    sides = [
        (fake_record("shared"), [served(0, 0.0, 1.0, 2.0, 3), served(1, 0.0, 2.0, 2.0, 1)]),
        (fake_record("unshared", hit_rate=0.0), [served(0, 0.0, 4.0, 5.0, 2)]),
    ]
    first, later, hits = serving_figure("title", sides).axes
    assert (first.get_xlabel(), later.get_xlabel()) == ("seconds", "milliseconds")
    assert hits.get_ylabel() == "% of prompt tokens"
    shared, unshared = first.get_lines()
    assert {1.0, 2.0} <= set(np.asarray(shared.get_xdata()).tolist())
    assert shared.get_color() != unshared.get_color()
    assert shared.get_linestyle() != unshared.get_linestyle()
    assert (
        500.0 in np.asarray(later.get_lines()[0].get_xdata()).tolist()
    )  # one second for two tokens
    assert [bar.get_height() for bar in hits.patches] == pytest.approx([30.0, 0.0])  # pyright: ignore
    assert "40.0" in hits.texts[-1].get_text()


# Bad input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": 0}, "--requests must be at least 1, got 0"),
        ({"scale": 48}, "--scale must divide 512"),
        ({"rate": 0.0}, "--rate must be a number above 0"),
        ({"speed": float("nan"), "trace": Path("t")}, "--speed must be a number above 0"),
        ({"speed": 2.0}, "--speed is only for a --trace; --rate sets how fast"),
        ({"rate": 2.0, "trace": Path("t")}, "--rate is not for a --trace; --speed sets how fast"),
        ({"own_tokens": 5, "trace": Path("t")}, "--own-tokens is not for a --trace"),
        ({"every": 2}, "--every is only for a --trace"),
        ({"closed": 2, "rate": 1.0}, "--closed and --rate exclude each other"),
        ({"sides": ()}, "--sides must name each side once, got: none"),
        ({"sides": ("shared", "shared")}, "--sides must name each side once"),
        ({"pool_chunks": 5, "pool_memory": "1GB"}, "--pool-chunks and --pool-memory exclude"),
        ({"warm_up": -1.0}, "--warm-up must be a number of seconds from 0 up"),
        ({"seed": -1}, "--seed must be from 0"),
    ],
)
def test_bad_values_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        check(ServeConfig(**change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trace", "absent.jsonl"], "--trace absent.jsonl cannot be read"),
        (["--model", "gpt5"], "--model gpt5: unknown model"),
        (["--pool-memory", "lots"], "--pool-memory lots: a size is a number of bytes"),
        (["--pool-chunks", "2"], "the largest request takes 6 chunks of 16 tokens and the pool"),
        (["--output", "file/out"], "file/out cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)
    Path("file").write_text("")
    assert main(["serve", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(Path("runs").glob("*"))
