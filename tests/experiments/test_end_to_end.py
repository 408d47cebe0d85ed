"""`python -m experiments generate` as a user runs it, on a tiny model with random weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pallas_kernels.cache_folder import CACHE_VARIABLE
from tests.effort import xla_flags
from tests.experiments.results import lines_in

COMMAND = [sys.executable, "-m", "experiments", "generate", "--model", "random:tiny"]
ROOT = Path(__file__).resolve().parents[2]


def environment(cache: Path) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        CACHE_VARIABLE: str(cache),
        "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "XLA_FLAGS": " ".join(filter(None, [os.environ.get("XLA_FLAGS"), xla_flags()])),
    }


def generate(folder: Path, cache: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *options],
        cwd=folder,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def cache() -> Path:
    """The module's own, where the compiled kernel is."""
    return Path(os.environ[CACHE_VARIABLE])


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cache: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("run")
    options = ["--batch", "4", "--max-tokens", "10", "--compare-batch", "2", "--output", "out"]
    return folder / "out", generate(folder, cache, *options)


@pytest.mark.slow
def test_it_succeeds_quietly(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, process = finished
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert "\x1b" not in process.stdout


@pytest.mark.slow
def test_the_summary_counts_what_was_shared(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, process = finished
    assert process.stdout.splitlines()[-1] == "results: out"
    summary = json.loads((folder / "summary.json").read_text())

    assert (summary["model"], summary["batch"]) == ("random:tiny", 4)
    assert summary["prompt_tokens"] == (
        summary["prefill_tokens_computed"] + summary["prefill_tokens_reused"]
    )
    # Of four prompts behind one prefix three reuse its whole chunks; a chunk holds 64 tokens.
    assert summary["shared_tokens"] >= 512
    assert summary["shared_tokens"] % 64 == 0
    assert summary["prefill_tokens_reused"] == 3 * summary["shared_tokens"]
    assert summary["kv_bytes_held"] < 0.5 * summary["kv_bytes_unshared"]
    assert summary["decode_tokens"] > 0
    assert summary["decode_tokens_per_second"] > 0
    assert summary["prefill_tokens_per_second"] > 0
    assert summary["compilations"] > 0
    assert summary["max_rss_bytes"] > 50 << 20
    assert summary["seconds"]["first_answer"] > summary["seconds"]["compile"] > 0


@pytest.mark.slow
def test_comparison_gives_the_same_answers(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    compare = json.loads((finished[0] / "summary.json").read_text())["compare"]
    assert compare["batch"] == compare["equal_answers"] == 2
    assert compare["prefill_tokens_reused"] == compare["shared_tokens"] == 0
    assert compare["kv_bytes_held"] == compare["kv_bytes_unshared"]


@pytest.mark.slow
def test_records_have_every_request(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, *lines = lines_in(finished[0])
    requests = [line for line in lines if line["kind"] == "request"]
    assert (run["kind"], run["experiment"]) == ("run", "generate")
    assert run["config"]["max_tokens"] == 10
    assert run["environment"]["versions"]["jax"]
    assert sorted(record["index"] for record in requests) == [0, 1, 2, 3]
    for record in requests:
        assert len(record["tokens"]) == 10
        assert record["finish_reason"] == "length"
        prompt = run["common_prefix_tokens"] + record["prompt_suffix_tokens"]
        assert len(prompt) == record["prompt_tokens"]
    assert (finished[0] / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
def test_given_tokens_without_sharing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}\n{"tokens": [1, 2, 4]}\n')
    options = ["--prompts", "prompts.jsonl", "--no-sharing", "--max-tokens", "3", "--json"]
    process = generate(tmp_path, cache, *options)
    assert process.returncode == 0, process.stderr
    summary = json.loads(process.stdout)  # and nothing else
    assert (summary["sharing"], summary["compare"], summary["shared_tokens"]) == (False, None, 0)
    assert summary["prefill_tokens_computed"] == 6


@pytest.mark.slow
def test_prompt_longer_than_the_model_is_told_before_work(tmp_path: Path, cache: Path) -> None:
    prompt = json.dumps({"tokens": [1] * 5000})
    (tmp_path / "prompts.jsonl").write_text(prompt + "\n")
    process = generate(tmp_path, cache, "--prompts", "prompts.jsonl")
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert process.stderr.count("\n") == 1
    assert "Traceback" not in process.stderr


def test_interrupt_keeps_the_results_so_far(tmp_path: Path, cache: Path) -> None:
    prompts = "".join(json.dumps({"tokens": [1 + i] * 8}) + "\n" for i in range(2))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    options = ["--prompts", "prompts.jsonl", "--max-tokens", "900", "--steps-per-call", "1"]
    process = subprocess.Popen(
        [*COMMAND, *options, "--output", "out"],
        cwd=tmp_path,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # A header and two answers: the 900 steps that do without sharing begin.
    results = tmp_path / "out" / "results.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if results.exists() and results.read_text().count("\n") >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert error.count("\n") == 1
    assert error.startswith("interrupted: the results so far")
    assert "results.jsonl" in error
    run, *lines = lines_in(tmp_path / "out")
    assert run["kind"] == "run"
    assert [line["index"] for line in lines if line["kind"] == "request"] == [0, 1]
    assert not (tmp_path / "out" / "summary.json").exists()
