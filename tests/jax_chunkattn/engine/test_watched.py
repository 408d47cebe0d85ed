"""What an engine tells of requests while they run: events of samples, prompts, chunks, reads."""

from __future__ import annotations

from jax_chunkattn import SamplingParams
from tests.jax_chunkattn.engine.engines import make_engine

PROMPT = [at % 50 for at in range(40)]


def test_each_sample_has_its_events_told():
    engine = make_engine()
    told: dict[int, list[int]] = {}
    ended = []

    def note(sample, event):
        told.setdefault(sample, []).extend(event.tokens)
        if event.finish_reason is not None:
            ended.append(sample)

    params = SamplingParams(7, temperature=1.0, seed=3, n=3)
    handles = engine.submit_samples(PROMPT, params, on_event=note)
    engine.run()
    assert told == {index: list(handle.tokens) for index, handle in enumerate(handles)}
    assert sorted(ended) == [0, 1, 2]


def test_a_request_knows_where_its_prompt_came_from():
    engine = make_engine()
    first = engine.submit(PROMPT, SamplingParams(2))
    assert first.prompt_use is None
    first.result()
    second = engine.submit([*PROMPT[:33], 1, 2], SamplingParams(2))
    second.result()
    assert first.prompt_use is not None
    assert (first.prompt_use.new, first.prompt_use.too_short) == (32, 8)
    assert second.prompt_use is not None
    assert second.prompt_use.hit == 32
    assert engine.stats.prompts == first.prompt_use + second.prompt_use
    fork = second.fork(next_token=3, params=SamplingParams(4))
    fork.result()
    assert fork.prompt_use is None


def test_chunks_and_the_tree_can_be_seen():
    engine = make_engine()
    handles = [engine.submit([*PROMPT[:32], at], SamplingParams(9)) for at in range(3)]
    assert handles[0].chunk_ids == ()
    while not all(handle.tokens for handle in handles):
        engine.step()
    common = {handle.chunk_ids[:2] for handle in handles}
    assert len(common) == 1
    [run] = engine.view_tree().runs
    assert (run.chunk_ids, run.users) == (common.pop(), 3)
    engine.run()
    assert handles[0].chunk_ids == ()
    assert [run.users for run in engine.view_tree().runs][:1] == [0]


def test_reads_that_plans_save_are_counted():
    engine = make_engine()
    list(engine.generate([PROMPT], SamplingParams(8)))
    stats = engine.stats
    assert 0 < stats.planned_reads == stats.planned_reads_unshared
    list(engine.generate([[*PROMPT[:32], at] for at in range(4)], SamplingParams(8)))
    more = engine.stats
    saved = more.planned_reads_unshared - more.planned_reads
    assert saved > 0
    assert saved % 3 == 0  # of each chunk that four rows read once
