"""`python -m experiments tiers`, small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.harness.errors import UserError
from experiments.harness.reading import read_result
from experiments.tier_option import check_tiers, tier_errors
from experiments.tiers.command import headline, run
from experiments.tiers.config import WAYS, TiersConfig, check
from experiments.tiers.views import figures, tables
from jax_chunkattn.engine.residency import TierError
from tests.experiments.results import lines_in


@pytest.mark.slow
def test_each_way_is_timed_and_nothing_is_left_on_the_disk(tmp_path: Path) -> None:
    sizes = {"lengths": (128, 256), "chunk_size": 32, "repeats": 2}
    config = TiersConfig(model="random:tiny", output=tmp_path / "out", disk=tmp_path, **sizes)
    summary = run(config)
    assert [one["length"] for one in summary["lengths"]] == [128, 256]
    first, second = summary["lengths"]
    assert second["bytes"] == 2 * first["bytes"]
    for one in summary["lengths"]:
        assert one["seconds"].keys() == WAYS.keys()
        assert all(seconds > 0 for seconds in one["seconds"].values())
    _, *records = lines_in(tmp_path / "out")
    assert [(one["length"], one["number"]) for one in records] == [
        (128, 0), (256, 0), (128, 1), (256, 1),
    ]  # fmt: skip
    assert [path for path in tmp_path.iterdir() if path.name != "out"] == []
    ratio = second["seconds"]["disk"] / second["seconds"]["computed"]
    assert headline(summary)["disk / computed"] == pytest.approx(ratio, abs=1e-3)
    result = read_result(tmp_path / "out")
    [table] = tables(result)
    assert all(words in str(table) for words in WAYS.values())
    assert figures(result).keys() == {"picture"}


def write_trace(path: Path, prompts: list[list[int]]) -> Path:
    lines = [
        {"timestamp": at, "input_length": 512 * len(ids) - 505, "output_length": 1, "hash_ids": ids}
        for at, ids in enumerate(prompts)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_of_a_trace_it_is_counted_where_each_block_is(tmp_path: Path) -> None:
    """A pool of four blocks, memory of two, a disk of eight."""
    first, other, third = [1, 2, 3, 90], [4, 5, 6, 91], [7, 8, 9, 92]
    trace = write_trace(tmp_path / "trace.jsonl", [first, first, other, first, third, first])
    config = TiersConfig(
        trace=trace,
        output=tmp_path / "out",
        pool_tokens=4 * 512,
        host_tokens=2 * 512,
        disk_tokens=8 * 512,
    )
    check(config)
    summary = run(config)
    assert summary["requests"] == 6
    found = [
        {place: tokens // 512 for place, tokens in one["found"].items()}
        for one in summary["replays"]
    ]
    # The pool holds three blocks of one prompt and one of another: of the first request's, which
    # comes again after each other, one is there, and the others are where they were put.
    pool = found[0]["pool"]
    assert [one["pool"] for one in found] == [pool] * 4
    assert (found[0]["host"], found[0]["disk"]) == (0, 0)
    assert found[1]["host"] == 0
    assert found[1]["disk"] > 0
    assert found[2]["disk"] == 0
    assert found[2]["host"] > 0
    assert sum(found[3].values()) == sum(found[1].values()), "the disk has all that was evicted"
    assert found[3]["host"] > 0
    assert all(one["tokens"] == 6 * (3 * 512 + 7) for one in summary["replays"])
    assert headline(summary)["found"] == pytest.approx(
        512 * sum(found[3].values()) / (6 * (3 * 512 + 7)), abs=1e-4
    )
    result = read_result(tmp_path / "out")
    [table] = tables(result)
    assert "2,048 tokens" in str(table)
    assert figures(result).keys() == {"picture"}


def test_a_trace_without_a_whole_block_is_refused(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", [[1]])
    with pytest.raises(UserError, match="no request with a whole block"):
        run(TiersConfig(trace=trace, output=tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"disk_tokens": 511}, "--disk-tokens must be at least 512"),
        ({"lengths": ()}, "--lengths must be at least a chunk of 64 tokens"),
        ({"lengths": (512, 63)}, "--lengths must be at least a chunk of 64 tokens"),
        ({"tokens": 65}, "--tokens must not be more than --chunk-size"),
        ({"repeats": 0}, "--repeats"),
    ],
)
def test_options_that_no_run_could_use_are_refused(options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(TiersConfig(model="random:tiny", **options))


class Options:
    """Of a command that takes tiers."""

    host_memory: str | None = "1GiB"
    disk: Path | None = Path("/folder")
    disk_memory: str = "20GiB"


def test_tiers_without_a_cache_or_a_size_are_refused() -> None:
    check_tiers(Options())
    with pytest.raises(UserError, match="of no use with --no-sharing"):
        check_tiers(Options(), sharing=False)
    wrong = Options()
    wrong.host_memory = "much"
    with pytest.raises(UserError, match=r"--host-memory: a size is .* got 'much'"):
        check_tiers(wrong)


def test_what_an_engine_says_of_tiers_is_told_in_a_line() -> None:
    with pytest.raises(UserError, match="a chunk takes much"), tier_errors(Options()):
        raise TierError("a chunk takes much")
    with (
        pytest.raises(UserError, match="--disk /folder: Permission denied"),
        tier_errors(Options()),
    ):
        raise PermissionError(13, "Permission denied", "/folder")
    without = Options()
    without.disk = None
    with pytest.raises(PermissionError), tier_errors(without):
        raise PermissionError(13, "Permission denied", "/somewhere")
