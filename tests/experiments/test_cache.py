"""`python -m experiments cache`, small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.cache import run as cache_run
from experiments.cache import views as cache_views
from experiments.cache.command import headline, run
from experiments.cache.config import CacheConfig, check
from experiments.cache.made_up import make_up
from experiments.cache.run import NO_BOUND
from experiments.cache.workload import read_workload
from experiments.harness.errors import UserError
from experiments.harness.reading import Result, read_result
from experiments.trace import ideal_block_hit_rate, read_trace

SMALL: dict[str, Any] = {**CacheConfig.SMOKE, "requests": 60, "pool_tokens": (50_000, 200_000)}


def write_trace(path: Path, *requests: tuple[int, list[int]]) -> Path:
    lines = (
        {"timestamp": 0, "input_length": tokens, "output_length": 1, "hash_ids": blocks}
        for tokens, blocks in requests
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def untimed_tables(folder: Path) -> list[Any]:
    return [table.untimed() for table in cache_views.tables(read_result(folder))]


def test_the_smoke_form_runs_and_every_policy_is_within_its_bounds(tmp_path: Path, capsys):
    summary = run(CacheConfig(**CacheConfig.SMOKE, output=tmp_path / "out"))
    assert "Prompt tokens found" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.jsonl", "summary.json", "hit-rates.png", "hit-rates.svg",
    }  # fmt: skip
    [fine, coarse] = summary["hit_rates"]
    for rates in (fine, coarse):
        for policy in ("lru", "fifo", "lfu", "lfu-aged", "length-aware"):
            assert all(0 < rate for rate in rates[policy])
            both = zip(rates[policy], rates["optimal"], strict=True)
            assert all(rate <= best <= rates[NO_BOUND] for rate, best in both)
        assert rates["free-at-once"][0] == 0 < rates["free-at-once"][-1] < rates[NO_BOUND]
    assert fine[NO_BOUND] > coarse[NO_BOUND]
    assert headline(summary) == {
        "hit rate, LRU, smallest pool": fine["lru"][0],
        "hit rate, LRU, largest pool": fine["lru"][2],
        "hit rate, optimal, smallest pool": fine["optimal"][0],
        "hit rate, no bound": fine[NO_BOUND],
    }


def test_equal_seeds_give_equal_tables_and_others_do_not(tmp_path: Path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        run(CacheConfig(**SMALL, policies=("lru", "lfu"), seed=seed, output=tmp_path / name))
    assert untimed_tables(tmp_path / "one") == untimed_tables(tmp_path / "again")
    assert untimed_tables(tmp_path / "one") != untimed_tables(tmp_path / "other")


def test_a_codec_finds_what_a_pool_of_as_many_tokens_does(tmp_path: Path):
    half = {**SMALL, "pool_tokens": (50_000,), "policies": ("lru",)}
    summary = run(CacheConfig(**half, codec=("identity", "int4"), output=tmp_path / "codecs"))
    lru = {rates["chunk_size"]: rates["lru"] for rates in summary["hit_rates"]}
    for chunk_size in half["chunk_sizes"]:
        identity, int4 = (
            one for one in summary["codec_hit_rates"] if one["chunk_size"] == chunk_size
        )
        assert identity["lru"] == lru[chunk_size]
        # Bits of a number: 4, two float16 for 64, and of a chunk's first key 4 more.
        bits = 4 + 32 / 64, 4 + 32 / 64 + 4 / chunk_size
        assert int4["times_as_many_tokens"] == pytest.approx(32 / sum(bits))
        tokens = int(50_000 * int4["times_as_many_tokens"])
        as_many = {**half, "pool_tokens": (tokens,), "chunk_sizes": (chunk_size,)}
        alone = run(CacheConfig(**as_many, output=tmp_path / str(chunk_size)))
        assert int4["lru"] == alone["hit_rates"][0]["lru"] > identity["lru"]
    shown = "\n".join(str(table) for table in untimed_tables(tmp_path / "codecs"))
    assert "LRU at equal bytes" in shown


def test_a_codec_that_cannot_store_such_heads_is_refused():
    with pytest.raises(ValueError, match="'int4' cannot store keys: 33 numbers"):
        check(CacheConfig(codec=("int4",), head_dim=33))
    with pytest.raises(UserError, match="--codec names one twice"):
        check(CacheConfig(codec=("int4", "int4")))


def test_a_run_that_was_broken_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[tuple[str, int]] = []
    measure = cache_run._Replays.measure

    def break_off(self: Any, policy: str, chunk_size: int) -> Any:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append((policy, chunk_size))
        return measure(self, policy, chunk_size)

    config = CacheConfig(**SMALL, output=tmp_path / "out")
    monkeypatch.setattr(cache_run._Replays, "measure", break_off)
    with pytest.raises(KeyboardInterrupt, match="5 lines"):
        run(config)
    before = list(measured)
    measured.clear()
    monkeypatch.setattr(
        cache_run._Replays,
        "measure",
        lambda self, *unit: (measured.append(unit), measure(self, *unit))[1],
    )
    run(config)
    assert len(measured) == 2 * 8 - 5
    assert not set(before) & set(measured)
    run(dataclasses.replace(config, output=tmp_path / "at once"))
    assert untimed_tables(tmp_path / "out") == untimed_tables(tmp_path / "at once")


def test_a_trace_is_replayed_in_whole_chunks(tmp_path: Path):
    trace = write_trace(
        tmp_path / "trace",
        (1500, [0, 1, 2]),  # 476 tokens in its last block
        (600, [3, 4]),
        (1500, [0, 1, 2]),
        (1100, [0, 1, 5]),
    )
    summary = run(
        CacheConfig(
            trace=trace, pool_tokens=(1_024, 2_000, 8_000), chunk_sizes=(100, 512, 1024),
            policies=("lru",), output=tmp_path / "out",
        )
    )  # fmt: skip
    assert (summary["prompt_tokens"], summary["distinct_tokens"]) == (4_700, 2_176)
    # A pool of 10 chunks of 100 can only hold the second request. In one of 20 that evicts a chunk
    # of the first; so it does in one of 3 chunks of 512, where it has a tail.
    expected = [(100, 0, 1_400 + 1_000, 2_500), (512, 0, 512 + 1_024, 2_048), (1024, 0, 0, 2_048)]
    for rates, (chunk_size, small, middle, large) in zip(
        summary["hit_rates"], expected, strict=True
    ):
        assert rates["chunk_size"] == chunk_size
        assert rates["lru"] == [round(hit / 4_700, 6) for hit in (small, middle, large)]
        assert rates[NO_BOUND] == rates["lru"][2]
    [record] = [
        record
        for record in read_result(tmp_path / "out").of_kind("replays")
        if (record["policy"], record["chunk_size"]) == ("lru", 100)
    ]
    assert [replay["refused"] for replay in record["replays"]] == [3, 0, 0]


def test_the_ideal_rate_of_blocks_counts_all_of_a_prompt(tmp_path: Path):
    trace = write_trace(tmp_path / "t", (900, [0, 1]), (900, [0, 1]), (1536, [0, 2, 3]), (5, [4]))
    assert ideal_block_hit_rate(read_trace(trace)) == 3 / 8


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([(1024, [0, 1]), (1024, [1, 0])], "line 2: hash id 1 stands for another prefix"),
        ([(600, [0, 1]), (700, [0, 1])], "line 2: hash id 1 stands for another prefix"),
        ([(600, [0])], "line 1: not a request of such a trace"),
        ([], "holds no requests"),
        ([(600, [0, 1]), (500, [0])], "line 2: hash id 0 stands for another prefix"),
        ([(600, [0, 1])], "--requests 2: --trace .* has 1"),
    ],
)
def test_a_trace_that_cannot_be_replayed_is_refused(
    tmp_path: Path, requests: list[tuple[int, list[int]]], message: str
):
    trace = write_trace(tmp_path / "trace", *requests)
    with pytest.raises(UserError, match=message):
        run(CacheConfig(trace=trace, requests=2, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_segments_are_what_the_same_requests_pass(tmp_path: Path):
    workload = read_workload(
        write_trace(tmp_path / "t", (1536, [0, 1, 2]), (2000, [0, 1, 3, 4]), (700, [5, 6]))
    )
    assert workload.paths == ((0, 1), (0, 2), (3,))
    assert workload.begins.tolist() == [0, 1024, 1024, 0]
    assert workload.ends.tolist() == [1024, 1536, 2000, 700]


def test_conversations_are_as_long_and_as_mixed_as_asked_for():
    config = CacheConfig(requests=4_000, tenants=20, turns=3.0, between=50.0)
    workload = make_up(config)
    assert len(workload.paths) == 4_000
    # The first segment is a tenant's system prompt, and what is left of a path is a conversation.
    lengths = workload.ends - workload.begins
    first = np.array([path[0] for path in workload.paths])
    assert (workload.begins[first] == 0).all()
    shares = np.sort(np.bincount(first))[::-1] / 4_000
    assert shares[0] == pytest.approx(1 / np.sum(1 / np.arange(1, 21.0)), rel=0.3)
    new = np.array([lengths[path[-1]] for path in workload.paths])
    turns = [len(path) - 1 for path in workload.paths]
    assert np.mean(turns) == pytest.approx(3.0, rel=0.1)  # geometric: as many as a conversation has
    assert np.mean(new) == pytest.approx(2_500 + 350 * 2 / 3, rel=0.1)
    # A turn's prompt begins with the one before, and comes after it.
    seen = set()
    for path in workload.paths:
        assert len(path) == 2 or path[:-1] in seen
        seen.add(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pool_tokens": ()}, "--pool-tokens names nothing"),
        ({"pool_tokens": (0,)}, "--pool-tokens must be at least 1"),
        ({"pool_tokens": (1_000,)}, "--pool-tokens 1000 is less than one chunk of .* 1024"),
        ({"policies": ("lru", "lru")}, "--policies names one twice: lru lru"),
        ({"policies": ("mru",)}, "--policies: unknown 'mru'; known: lru, free-at-once, fifo"),
        ({"in_use": (0,)}, "--in-use must be at least 1"),
        ({"turns": 0.5}, "--turns must be at least 1"),
        ({"turns": float("nan")}, "--turns must be a number above 0"),
        ({"between": 0.0}, "--between must be a number above 0"),
        ({"turns": 1e300}, "--turns must be at most 1,000, got 1e"),
        ({"system_tokens": 10**18}, "--system-tokens must be at most 1,000,000"),
        ({"question_tokens": 10**18}, "--question-tokens must be at most 1,000,000"),
        ({"answer_tokens": 10**400}, "--answer-tokens must be at most 1,000,000"),
        ({"zipf": -1.0}, "--zipf must be from 0"),
        ({"bytes_per_token": 0}, "--bytes-per-token must be at least 1"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"trace": Path("t"), "tenants": 3}, "--tenants is not for a --trace"),
        ({"trace": Path("missing")}, "--trace missing cannot be read"),
        ({"requests": 0}, "--requests must be at least 1"),
    ],
)
def test_bad_values_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        run(CacheConfig(**{**CacheConfig.SMOKE, "output": tmp_path / "out", **change}))
    assert not (tmp_path / "out").exists()


def made_up_result(config: CacheConfig) -> Result:
    check(config)
    replay = {"refused": 2, "evicted_chunks": 1234, "requests_hit": 5, "pool_tokens": 640}
    records = [
        {
            "kind": "replays", "policy": policy, "chunk_size": 64, "seconds": 0.5,
            "tokens_per_second": 2e6,
            "replays": [{**replay, "hit_rate": 0.25 + 0.1 * index} for index in range(2)],
        }
        for policy in (NO_BOUND, *config.policies)
    ]  # fmt: skip
    header = {
        "workload": "some requests", "num_requests": 10, "prompt_tokens": 1_000,
        "distinct_tokens": 600, "longest_prompt": 90,
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
    }  # fmt: skip
    return Result(Path("x"), header, records, None)


def test_tables_show_each_pool_and_mark_what_is_simulated():
    config = CacheConfig(
        policies=("lru", "fifo", "free-at-once"), pool_tokens=(1_000_000, 2**30),
        chunk_sizes=(64,), in_use=(1, 9), bytes_per_token=1024,
    )  # fmt: skip
    hits, evicted, free, times = cache_views.tables(made_up_result(config))
    assert [column.heading for column in hits.columns] == [
        "chunk", "pool, tokens", "GiB", "refused", "LRU", "FIFO*",
    ]  # fmt: skip
    assert hits.rows == [
        ("64", "1,000,000", "1.0", "2", "25.00%", "25.00%"),
        ("64", "1,073,741,824", "1,024.0", "2", "35.00%", "35.00%"),
        ("64", "no bound", "", "0", "25.00%", "25.00%"),
    ]
    assert evicted.rows[0] == ("64", "1,000,000", "1,234", "1,234")
    assert free.rows[1] == ("64", "9", "640", "35.00%", "50.00%")
    assert times.rows[1] == ("lru", "64", "2", "500", "2")
    figure = cache_views.figures(made_up_result(config))["hit-rates"]
    [axes] = figure.axes
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["LRU", "FIFO*", "free at once", "no bound"]
    assert axes.get_xlabel() == "pool, tokens"
    assert "%" in axes.get_ylabel()


def test_the_papers_policy_alone_has_no_table_by_pool():
    config = CacheConfig(policies=("free-at-once",), chunk_sizes=(64,), in_use=(1, 9))
    free, _ = cache_views.tables(made_up_result(config))
    assert free.title.startswith("Free at once")
    assert len(cache_views.figures(made_up_result(config))) == 1
