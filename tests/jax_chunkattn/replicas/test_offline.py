"""Files of prompts: every line is answered exactly once, whatever breaks off in between."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from jax_chunkattn import Engine, KVEvents, SamplingParams
from jax_chunkattn.replicas.offline import OfflineJob, OfflineWorker
from tests.jax_chunkattn.engine.engines import make_engine, run

PARAMS = SamplingParams(6, temperature=1.0, seed=3)
LINES = 23


def prompts() -> list[list[int]]:
    """Of three families, all mixed."""
    choose = random.Random(0)
    return [[number % 3] * 40 + [choose.randrange(200), number] for number in range(LINES)]


@pytest.fixture
def job(tmp_path: Path) -> OfflineJob:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts()))
    return OfflineJob(path, tmp_path / "answers.jsonl", PARAMS, block_lines=4)


def counted_engine(submitted: list[Any]) -> Any:
    """What makes engines; the prompts that they are given are noted."""

    def make(events: KVEvents) -> Engine:
        engine = make_engine(kv_events=events)
        submit = engine.submit

        def note(prompt, *arguments, **options):
            submitted.append(prompt)
            return submit(prompt, *arguments, **options)

        engine.submit = note
        return engine

    return make


def read(job: OfflineJob) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.answers.read_text().splitlines()]


def test_a_job_that_broke_off_goes_on_with_what_is_missing(job: OfflineJob):
    blocks = job.begin()
    assert blocks == [0, 1, 2, 3, 4, 5]
    submitted: list[Any] = []
    first = OfflineWorker(job, counted_engine(submitted))
    first({"block": blocks[1:4]})
    torn = job.parts / f"block-000004.jsonl.{12345}"  # a process that died while it wrote
    torn.write_text('{"line": 3, "tok')
    with pytest.raises(FileNotFoundError):
        job.finish()
    assert job.begin() == [0, 4, 5]
    second = OfflineWorker(job, counted_engine(submitted))
    second({"block": [4, 3, 0]})
    second({"block": [5]})
    assert sorted(submitted) == sorted(prompts())
    assert job.finish() == LINES
    answers = read(job)
    assert [one["line"] for one in answers] == list(range(LINES))
    engine = make_engine()
    alone = run([engine.submit(p, job._params_of(n)) for n, p in enumerate(prompts())])
    assert [one["tokens"] for one in answers] == alone
    assert {one["finish_reason"] for one in answers} == {"length"}
    assert not job.parts.exists()
    with pytest.raises(FileExistsError, match="there already"):
        job.begin()


def test_prompts_that_begin_alike_are_computed_together(job: OfflineJob):
    for lines in job.sorted_blocks()[:2]:
        assert {prompt[0] for _, prompt in lines} == {0}
    submitted: list[Any] = []
    worker = OfflineWorker(job, counted_engine(submitted))
    worker({"block": job.begin()})
    families = [prompt[0] for prompt in submitted]
    assert families == sorted(families)


def test_a_line_that_no_engine_serves_says_so_and_others_are_answered(tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": [1, 2]}\n{"prompt": [99999]}\n{"prompt": "text"}\n')
    job = OfflineJob(path, tmp_path / "answers.jsonl", SamplingParams(3))
    OfflineWorker(job, counted_engine([]))({"block": job.begin()})
    assert job.finish() == 3
    good, unknown, text = read(job)
    assert len(good["tokens"]) == 3
    assert "99999" in unknown["error"]
    assert "tokenizer" in text["error"]


def test_parts_of_another_job_are_not_taken_for_ones_own(job: OfflineJob):
    job.begin()
    other = OfflineJob(job.prompts, job.answers, SamplingParams(7), block_lines=4)
    with pytest.raises(FileExistsError, match="another job"):
        other.begin()
    job.prompts.write_text('{"question": 1}\n')
    with pytest.raises(FileExistsError, match="another job"):
        job.begin()
    fresh = OfflineJob(job.prompts, job.answers.with_name("more.jsonl"))
    with pytest.raises(ValueError, match="line 0: no prompt"):
        fresh.begin()
    job.prompts.write_text('{"prompt": [1]}\n{"prompt": [1, "a"]}\n')
    with pytest.raises(ValueError, match="line 1: no prompt"):
        OfflineJob(job.prompts, job.answers.with_name("most.jsonl")).begin()
