"""Prompts computed by several calls of a round: the same answers, sooner on a CPU."""

from __future__ import annotations

import pytest

from jax_chunkattn import PlannerOptions, SamplingParams
from jax_chunkattn.device.device import Device
from tests.jax_chunkattn.engine.engines import SHARE_ALL, assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_faults import Fault
from tests.jax_chunkattn.engine.test_interrupts import Interrupt
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, windowed_model

[LONG] = token_tree((1, 384), seed=21)
PARAMS = SamplingParams(4)
SLOW = pytest.mark.slow
FOR_GPU = PlannerOptions.for_gpu(
    num_heads=4, num_kv_heads=2, head_dim=16, chunk_size=16, dtype_bytes=4
)


@pytest.fixture
def sent(monkeypatch):
    """The tokens of each prefill call, and "decode" for each of the others, as they are sent."""
    calls = []
    prefill, decode = Device.prefill, Device.decode

    def note_prefill(self, segments, slots, num_tokens, window_ids=None):
        calls.append(num_tokens)
        return prefill(self, segments, slots, num_tokens, window_ids)

    def note_decode(self, *args):
        calls.append("decode")
        return decode(self, *args)

    monkeypatch.setattr(Device, "prefill", note_prefill)
    monkeypatch.setattr(Device, "decode", note_decode)
    return calls


@pytest.mark.parametrize(
    ("tokens", "calls"),
    [
        (30, [32]),
        (160, [128, 32]),
        (288, [128, 128, 32]),
        pytest.param(384, [512], marks=SLOW),
    ],
)
def test_the_calls_of_a_prompt_are_sent_in_one_turn_before_rows_decode(sent, tokens, calls):
    engine = make_engine()
    other = engine.submit([5], SamplingParams(100))
    while not other.tokens:
        engine.step()
    sent.clear()
    prompt = [*LONG, *LONG][:tokens]
    handle = engine.submit(prompt, PARAMS)
    while not any(call != "decode" for call in sent):
        engine.step()
    while sent[0] == "decode":
        sent.pop(0)
    assert sent == [*calls, "decode"]
    assert list(handle.result().tokens) == greedy_without_cache(prompt, 4)
    other.abort()
    assert_all_returned(engine)


def test_plans_for_a_gpu_have_one_call(monkeypatch):
    engine = make_engine(planner=FOR_GPU, implementation="reference")
    engine.submit(LONG[:160], PARAMS)
    calls = []

    def stop(_, segments, slots, num_tokens, window_ids):
        calls.append(num_tokens)
        raise Interrupt  # before anything is compiled

    monkeypatch.setattr(Device, "prefill", stop)
    with pytest.raises(Interrupt):
        engine.step()
    assert calls == [512]


def test_who_is_computed_by_an_earlier_call_has_its_token_no_later(sent):
    """And who comes while a round is sent waits for the next: the rows' wait has an end."""
    engine = make_engine()
    first, second = engine.submit(LONG[:20], PARAMS), engine.submit(LONG[200:340], PARAMS)
    engine.step()
    assert sent == [32, 128, "decode"]
    engine.step()
    assert len(first.tokens) == 1
    assert not second.tokens
    assert run([first, second]) == [
        greedy_without_cache(prompt, 4) for prompt in (LONG[:20], LONG[200:340])
    ]


def test_prompts_that_build_on_one_another_in_calls_of_a_round(sent):
    """Each chunk is computed once, whichever call has it."""
    prompts = token_tree((1, 100), (2, 40), (2, 15), seed=22)
    engine = make_engine()
    assert run([engine.submit(prompt, SamplingParams(1)) for prompt in prompts]) == [
        greedy_without_cache(prompt, 1) for prompt in prompts
    ]
    assert sent == [128, 128, 32]
    assert engine.stats.prefill_tokens < sum(map(len, prompts)) / 2
    assert_all_returned(engine)


@SLOW
def test_encoded_chunks_are_what_they_are_in_one_call(sent):
    """A part ends where a chunk does, or with its prompt."""
    prompts = [LONG[:100], LONG[150:210], LONG[300:341]]
    answers = []
    for planner in (SHARE_ALL, FOR_GPU):
        engine = make_engine(planner=planner, implementation="reference", codec="int4")
        answers.append(run([engine.submit(prompt, PARAMS) for prompt in prompts]))
    assert answers[0] == answers[1]
    assert [call for call in sent if call != "decode"][-1] == 512
    assert 128 in sent


@SLOW
def test_windows_have_room_for_the_calls_of_a_round(sent):
    """32 chunks for the tokens of a turn, and 6 for each of 4 sequences."""
    engine = make_engine(model=windowed_model(), window_chunks=32 + 4 * 6)
    prompts = token_tree((2, 150), (3, 40), (2, 11), seed=24)
    handles = [engine.submit(prompt, PARAMS) for prompt in prompts]
    while engine.step():
        engine.check()
    assert run(handles) == [
        greedy_without_cache(prompt, 4, model=windowed_model()) for prompt in prompts
    ]
    assert 128 in sent
    assert_all_returned(engine)


@SLOW
def test_continuations_are_scored_by_small_calls_and_nothing_is_compiled(sent):
    engine = make_engine()
    engine.warm_up(scores=True)
    before = engine.stats.compilations
    others = token_tree((10, 32), seed=23)
    found = engine.score(LONG[:100], others)
    assert sent == [128, 32, 128, 128, 32]
    one_call = make_engine(prefill_tokens=32).score(LONG[:100], others)
    assert [one.total for one in found] == pytest.approx([one.total for one in one_call], abs=1e-4)
    run([engine.submit(LONG[:length], PARAMS) for length in (160, 288, 384)])
    assert engine.stats.compilations == before


@pytest.mark.parametrize(
    ("error", "at"),
    [
        (Fault, 1),
        (Interrupt, 1),
        *(pytest.param(error, at, marks=SLOW) for error in (Fault, Interrupt) for at in (0, 2)),
    ],
)
def test_a_round_that_is_broken_off_between_its_calls_is_computed_again(monkeypatch, error, at):
    engine = make_engine()
    row = engine.submit([5], SamplingParams(12))
    engine.step()
    handle = engine.submit(LONG[:288], PARAMS)
    prefill, calls = Device.prefill, []

    def broken(self, *args):
        calls.append(args)
        if len(calls) == at + 1:
            raise error
        return prefill(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Device, "prefill", broken)
        while len(calls) <= at:
            try:
                engine.step()
            except Interrupt:
                assert error is Interrupt
    assert list(handle.result().tokens) == greedy_without_cache(LONG[:288], 4)
    assert list(row.result().tokens) == greedy_without_cache([5], 12)
    assert engine.stats.recoveries == 1
    assert_all_returned(engine)


def test_no_row_waits_for_more_tokens_than_a_turn_may_compute(sent):
    engine = make_engine(prefill_tokens=128)
    [answer] = run([engine.submit(LONG[:160], PARAMS)])
    assert answer == greedy_without_cache(LONG[:160], 4)
    assert sent[:2] == [128, 32]
    sent.clear()
    row = engine.submit([5], SamplingParams(60))
    engine.step()
    run([engine.submit(LONG[100:384], PARAMS), row])
    assert sum(call == 128 for call in sent) == 2
    prompts = [index for index, call in enumerate(sent) if call in (32, 128)][1:]
    assert all(sent[index + 1] == "decode" for index in prompts)
