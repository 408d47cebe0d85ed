"""What the engine promises a caller: tokens, sharing, order, and errors that touch nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_chunkattn import (
    CacheConfig,
    Engine,
    EngineClosed,
    InvalidRequest,
    PoolExhausted,
    RequestFailed,
    SamplingParams,
    chunks_needed,
)
from jax_chunkattn.device.decode_loop import Chosen
from jax_chunkattn.device.device import Results
from jax_chunkattn.engine.requests import Pinned
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.sampling import RowSampling, log_probabilities, sample_seed
from jax_chunkattn.tree.prefix_tree import PrefixTree
from tests.interpreted import implementations
from tests.jax_chunkattn.engine.engines import BytePairs, assert_all_returned, make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree, toy_model


@pytest.mark.parametrize(
    ("chunk_size", "sharing"),
    [(16, True), (16, False), pytest.param(64, True, marks=pytest.mark.slow)],
)
def test_tokens_equal_those_of_a_model_without_a_cache(chunk_size, sharing):
    """Three levels of sharing, unequal lengths, chunk boundaries crossed, rows that come and go."""
    prompts = token_tree((1, 137), (2, 40), (3, 21)) + token_tree((1, 64), (1, 1), seed=1)
    prompts += [prompts[0][:128], prompts[0][:130], prompts[0]]
    engine = make_engine(chunk_size=chunk_size, sharing=sharing, max_running=4)
    handles = []
    for index, prompt in enumerate(prompts):
        handles.append(engine.submit(prompt, SamplingParams(max_tokens=8 + 7 * (index % 4))))
        engine.step()
        engine.check()
    while engine.step():
        engine.check()
    for handle in handles:
        assert list(handle.tokens) == greedy_without_cache(handle.prompt, handle.params.max_tokens)
        assert handle.finish_reason == "length"
    use = engine.stats.prompts
    assert use.num_tokens == sum(map(len, prompts))
    assert use.hit > 500 if sharing else use.hit == use.copied == 0
    assert_all_returned(engine)


@implementations
@pytest.mark.slow
def test_each_implementation_decodes_the_same(implementation):
    prompts = token_tree((1, 70), (4, 9))
    engine = make_engine(planner=None, implementation=implementation)
    tokens = [output.samples[0].tokens for output in engine.generate(prompts, SamplingParams(12))]
    assert engine.backend.decode == engine.backend.prefill == implementation
    assert [list(each) for each in tokens] == [greedy_without_cache(p, 12) for p in prompts]


def test_a_common_prefix_of_requests_that_arrive_together_is_computed_once():
    engine = make_engine()
    run([engine.submit(prompt, SamplingParams(1)) for prompt in token_tree((1, 100), (5, 10))])
    stats = engine.stats
    assert stats.prefill_tokens == 110 + 4 * (110 - 96)
    assert stats.prompts.hit == 4 * 96


def test_what_was_computed_stays_for_later_requests():
    [prompt] = token_tree((1, 100))
    engine = make_engine()
    [first] = run([engine.submit(prompt, SamplingParams(max_tokens=40))])
    computed = engine.stats.prefill_tokens
    longer = prompt + first[:30] + [3]
    [second] = run([engine.submit(longer, SamplingParams(max_tokens=5))])
    assert engine.stats.prefill_tokens - computed == 131 - 128
    assert second == greedy_without_cache(longer, 5)


@pytest.mark.parametrize("length", [16, 64, 128])
def test_a_prompt_that_is_cached_as_a_whole_still_gets_its_next_token(length):
    [prompt] = token_tree((1, length))
    engine = make_engine()
    [first] = run([engine.submit(prompt, SamplingParams(max_tokens=4))])
    [again] = run([engine.submit(prompt, SamplingParams(max_tokens=4))])
    assert engine.stats.prefill_tokens == length + 1
    assert again == first == greedy_without_cache(prompt, 4)


def test_the_matching_part_of_a_chunk_is_copied_not_computed():
    [prompt] = token_tree((1, 64))
    engine = make_engine()
    run([engine.submit(prompt, SamplingParams(max_tokens=1))])
    computed = engine.stats.prefill_tokens
    other = [*prompt[:42], (prompt[42] + 1) % 256, *prompt[43:60]]
    [tokens] = run([engine.submit(other, SamplingParams(max_tokens=6))])
    assert tokens == greedy_without_cache(other, 6)
    assert engine.stats.prefill_tokens - computed == 60 - 42
    assert engine.stats.prompts.copied == 42 - 32


def test_a_chunk_is_not_shared_while_sharing_is_off():
    prompts = token_tree((1, 64), (4, 16))
    shared, unshared = make_engine(), make_engine(sharing=False)
    for engine in (shared, unshared):
        run([engine.submit(prompt, SamplingParams(max_tokens=16)) for prompt in prompts])
    per_chunk = CacheConfig(1, 16).bytes_per_chunk(toy_model().cache_spec)
    assert per_chunk == 2 * 2 * 2 * 16 * 16 * 4
    # 64 + 16 prompt tokens and 15 generated ones: 4 chunks in common, 2 of a row's own.
    assert shared.stats.kv_bytes_held == (4 + 4 * 2) * per_chunk
    assert shared.stats.kv_bytes_unshared == 4 * 6 * per_chunk
    assert shared.stats.kv_bytes_saved == 3 * 4 * per_chunk
    assert unshared.stats.kv_bytes_held == unshared.stats.kv_bytes_unshared == 4 * 6 * per_chunk
    assert unshared.stats.prefill_tokens == 4 * 80
    assert shared.stats.plan_decision.startswith("shared: ")
    assert unshared.stats.plan_decision.startswith("unshared: ")
    assert (shared.stats.shared_tokens, unshared.stats.shared_tokens) == (64, 0)


def test_stop_tokens_end_a_request_and_are_its_last_token():
    [prompt] = token_tree((1, 33))
    free = greedy_without_cache(prompt, 30)
    stop = free[11]
    expected = free[: free.index(stop) + 1]
    engine = make_engine(stop_tokens=iter(np.array([stop, 255])))
    own = make_engine()
    for handle in (
        engine.submit(prompt, SamplingParams(max_tokens=30)),
        own.submit(prompt, SamplingParams(max_tokens=30, stop_token_ids=[stop])),
    ):
        completion = handle.result()
        assert list(completion.tokens) == expected
        assert completion.finish_reason == "stop"
    ignoring = SamplingParams(max_tokens=30, ignore_eos=True)
    assert run([engine.submit(prompt, ignoring)]) == [free]


@pytest.mark.slow
def test_steps_per_call_changes_nothing_but_the_number_of_calls():
    prompts = token_tree((1, 60), (3, 5))
    tokens, calls = [], []
    for steps in (1, 3, 64):
        engine = make_engine(steps_per_call=steps)
        tokens.append(run([engine.submit(prompt, SamplingParams(21)) for prompt in prompts]))
        calls.append(engine.stats.calls)
    assert tokens[0] == tokens[1] == tokens[2]
    assert calls[0] >= 20 > calls[1] >= 7 > calls[2]


def test_a_plan_is_made_only_when_the_tree_changes():
    engine = make_engine()
    run([engine.submit([7], SamplingParams(max_tokens=10))])
    assert engine.stats.calls >= 3
    assert engine.stats.plans == 1


def test_sampling_depends_on_the_seed_and_on_nothing_else_in_the_batch():
    prompts = token_tree((1, 40), (4, 6))
    params = [SamplingParams(20, temperature=1.0, seed=seed) for seed in (1, 2, 3, 4)]
    engine = make_engine()
    together = run([engine.submit(*each) for each in zip(prompts, params, strict=True)])
    alone = [
        run([make_engine(sharing=False).submit(*each)])[0]
        for each in zip(prompts, params, strict=True)
    ]
    assert together == alone
    other_seed = run([make_engine().submit(prompts[0], SamplingParams(20, 1.0, seed=9))])
    assert other_seed[0] != together[0]


def test_a_long_prompt_does_not_hold_up_running_rows():
    """Its pieces take turns with decode calls."""
    short, long = token_tree((1, 20))[0], token_tree((1, 400), seed=1)[0]
    engine = make_engine(prefill_tokens=32)
    running = engine.submit(short, SamplingParams(max_tokens=60))
    while len(running.tokens) < 4:
        engine.step()
    late = engine.submit(long, SamplingParams(max_tokens=4))
    before = len(running.tokens)
    while not late.tokens:
        engine.step()
    assert len(running.tokens) - before >= 2 * (400 // 32 - 2)
    assert run([running, late]) == [
        greedy_without_cache(short, 60),
        greedy_without_cache(long, 4),
    ]


def test_first_come_first_served_unless_priorities_say_otherwise():
    prompts = token_tree((5, 30))
    engine = make_engine(max_running=1)
    finished = []
    for index, (prompt, priority) in enumerate(zip(prompts, (0, 0, 5, -1, 0), strict=True)):

        def note(event, index=index):
            if event.finish_reason:
                finished.append(index)

        engine.submit(prompt, SamplingParams(3), priority=priority, on_event=note)
    engine.run()
    assert finished == [3, 0, 1, 4, 2]


def test_streams_carry_every_token_once_whoever_advances_the_engine():
    prompts = token_tree((1, 40), (3, 4))
    engine = make_engine()
    handles = [engine.submit(prompt, SamplingParams(10)) for prompt in prompts]
    called = []
    handles.append(engine.submit(prompts[0], SamplingParams(10), on_event=called.append))
    for handle in handles:
        events = list(handle.stream())
        assert [token for event in events for token in event.tokens] == list(handle.tokens)
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason == "length"
        assert len(events) >= 4
    assert called == events


def test_samples_of_one_prompt_compute_it_once_and_copy_the_tail():
    [prompt] = token_tree((1, 100))
    engine = make_engine()
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=4)
    [output] = engine.generate([prompt], params)
    tokens = [list(sample.tokens) for sample in output.samples]
    seeds = [sample.seed for sample in output.samples]
    assert seeds == [7, *(sample_seed(7, index) for index in (1, 2, 3))]
    alone = [replace(params, n=1, seed=seed) for seed in seeds]
    assert tokens == [run([make_engine().submit(prompt, one)])[0] for one in alone]
    assert len({tuple(each) for each in tokens}) == 4
    assert engine.stats.forks == 3
    assert engine.stats.prefill_tokens == 100 + 3
    assert_all_returned(engine)


def test_text_comes_with_a_tokenizer_and_stops_at_a_stop_string():
    engine = make_engine(tokenizer=BytePairs())
    [free] = run([engine.submit("a prompt", SamplingParams(40))])
    assert free == greedy_without_cache(list(b"a prompt"), 40)
    whole = bytes(free).decode(errors="replace")
    plain = [i for i in range(len(free) - 1) if free[i] < 128 and free[i + 1] < 128]
    at = plain[len(plain) // 2]
    stop = bytes(free[at : at + 2]).decode()
    handle = engine.submit("a prompt", SamplingParams(40, stop=stop))
    text = "".join(event.text for event in handle.stream())
    assert text == handle.text == whole[: whole.index(stop)]
    assert handle.finish_reason == "stop"
    assert bytes(handle.tokens).endswith(stop.encode())
    assert_all_returned(engine)


def test_logprobs_are_those_of_the_model():
    [prompt] = token_tree((1, 30))
    engine = make_engine()
    plain = engine.submit(prompt, SamplingParams(9))
    asked = engine.submit(prompt, SamplingParams(9, logprobs=3))
    completion = asked.result()
    assert plain.result().logprobs == ()
    assert completion.tokens == plain.tokens
    assert len(completion.logprobs) == 9
    for token, logprobs in zip(completion.tokens, completion.logprobs, strict=True):
        ids, values = zip(*logprobs.top, strict=True)
        assert ids[0] == token  # greedy
        assert len(set(ids)) == 3
        assert values[0] == pytest.approx(logprobs.chosen, abs=1e-5)
        assert list(values) == sorted(values, reverse=True)
        assert np.exp(values).sum() <= 1


def test_no_more_logprobs_are_reported_than_the_vocabulary_has_tokens():
    """A beam search over more than there are would go on with padding."""
    asked = RowSampling.stack([SamplingParams(logprobs=10), SamplingParams(logprobs=2)], 2)
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]))
    logprobs = log_probabilities(logits, jnp.array([0, 1]), asked.logprobs)
    tokens = np.array([[0, 1]], np.int32)
    results = Results(Chosen(tokens, jax.tree.map(lambda one: np.asarray(one)[None], logprobs)))
    [best] = results.logprobs_of(0, 10, 1)
    assert [token for token, _ in best.top] == [0, 1, 2]
    assert [value for _, value in best.top] == pytest.approx(np.log([0.5, 0.3, 0.2]))
    [best] = results.logprobs_of(1, 2, 1)
    assert [token for token, _ in best.top] == [2, 1]
    assert results.logprobs_of(1, 0, 1)[0].top == ()


def test_penalties_count_the_prompt_and_what_was_generated():
    [prompt] = token_tree((1, 30))
    engine = make_engine()
    [free] = run([engine.submit(prompt, SamplingParams(40))])
    assert len(set(free)) < 40
    [penalised] = run([engine.submit(prompt, SamplingParams(40, frequency_penalty=2.0))])
    assert len(set(penalised)) > len(set(free))
    first = free[0]
    [biased] = run([engine.submit(prompt, SamplingParams(40, logit_bias={first: -100.0}))])
    assert first not in biased


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ([], {}, InvalidRequest, "prompt 1 is empty"),
        ([5, 256], {}, InvalidRequest, "prompt 1 has token id 256 at position 1; .* 0 to 255"),
        ([-1], {}, InvalidRequest, "token id -1 at position 0"),
        ([0.5], {}, InvalidRequest, "must be a sequence of token ids"),
        (["a"], {}, InvalidRequest, "must be a sequence of token ids"),
        ([[1], [2, 3]], {}, InvalidRequest, r"must be a sequence of token ids, got \[\[1\], "),
        ([[1, 2]], {}, InvalidRequest, "must be a sequence of token ids"),
        (5, {}, InvalidRequest, "prompt 1 must be a sequence of token ids, got 5"),
        (None, {}, InvalidRequest, "prompt 1 must be a sequence of token ids, got None"),
        (iter([1]), {}, InvalidRequest, "prompt 1 must be a sequence of token ids, got <list_iter"),
        (np.zeros(0), {}, InvalidRequest, "prompt 1 is empty"),
        ("text", {}, InvalidRequest, "text needs an engine with a tokenizer"),
        ([1], {"stop": "x"}, InvalidRequest, "stop strings need a tokenizer"),
        ([1], {"stop_token_ids": [256]}, InvalidRequest, "prompt 1: .*256"),
        ([1], {"logit_bias": {300: 1.0}}, InvalidRequest, "prompt 1: .*300"),
        ([1] * 1000, {"max_tokens": 25}, InvalidRequest, "asks for 25 more; .* 1024 positions"),
        ([1] * 200, {}, PoolExhausted, "needs 13 chunks of 16 .* the pool has 12"),
    ],
)
def test_a_bad_request_is_refused_before_anything_changes(prompt, params, error, message):
    engine = make_engine(num_chunks=12)
    each = [SamplingParams(4), SamplingParams(**{"max_tokens": 4, **params})]
    with pytest.raises(error, match=message):
        engine.generate([[1, 2, 3], prompt], each)
    assert engine.stats.submitted == 0
    assert not engine.has_work
    assert_all_returned(engine)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize(
    ("salt", "message"),
    [
        (None, "the salt must be text, got None"),
        (b"x", "the salt must be text, got b'x'"),
        ("a\udcff", r"the salt has half a surrogate pair, '\\udcff', at character 1"),
    ],
)
def test_a_bad_salt_is_refused_before_anything_changes(salt, message, sharing):
    engine = make_engine(sharing=sharing)
    for call in (
        lambda: engine.submit([1, 2], salt=salt),
        lambda: engine.submit_samples([1, 2], SamplingParams(n=2), salt=salt),
        lambda: engine.generate([[1, 2]], salt=salt),
        lambda: engine.pin([1] * 20, salt=salt),
    ):
        with pytest.raises(InvalidRequest, match=message):
            call()
    assert engine.stats.submitted == 0
    assert_all_returned(engine)


def test_a_prompt_that_is_no_text_is_refused_before_it_is_encoded():
    engine = make_engine(tokenizer=BytePairs())
    with pytest.raises(InvalidRequest, match=r"prompt 1 has half a surrogate pair, .* 2: "):
        engine.generate(["text", "a \ud800"])
    assert engine.stats.submitted == 0


@pytest.mark.parametrize("priority", [None, "high", 1.0, float("nan"), True, np.True_, (0,)])
@pytest.mark.parametrize("waiting", [0, 1])
def test_a_priority_that_is_no_integer_is_refused_before_anything_changes(priority, waiting):
    engine = make_engine()
    handles = [engine.submit([1, 2, 3], SamplingParams(4)) for _ in range(waiting)]
    before = engine.stats
    for submit in (engine.submit, engine.submit_samples):
        with pytest.raises(InvalidRequest, match="priority must be an integer, got "):
            submit([1, 2], SamplingParams(4), priority=priority)
    assert engine.stats == before
    of_numpy: Any = np.int64(-1)
    engine.submit([1, 2], SamplingParams(4), priority=of_numpy).abort()
    for handle in handles:
        handle.abort()
    assert_all_returned(engine)


def test_work_that_cannot_be_queued_is_not_accepted():
    scheduler = Scheduler(PrefixTree(4, 4), max_running=1)
    scheduler.enqueue(Pinned((1,), b"", (0, 0)))
    order: Any = ("high", 1)
    with pytest.raises(TypeError):
        scheduler.enqueue(Pinned((1,), b"", order))
    assert list(scheduler.accepted) == scheduler.waiting


def test_one_sampling_for_each_prompt():
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="1 sampling parameters for 2 prompts"):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(InvalidRequest, match="n is 2: use submit_samples"):
        engine.submit([1], SamplingParams(n=2))
    with pytest.raises(InvalidRequest, match="SamplingParams"):
        engine.submit([1], {"max_tokens": 2})  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidRequest, match="the prompt needs SamplingParams, got None"):
        engine.submit_samples([1], None)  # pyright: ignore[reportArgumentType]
    assert engine.stats.submitted == 0


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([1, 2, 3], SamplingParams(), r"got \[1, 2, 3\]: put the token ids of one in a list"),
        (np.arange(3), SamplingParams(), "put the token ids of one in a list"),
        (5, SamplingParams(), "prompts must be a sequence of prompts, got 5"),
        (None, SamplingParams(), "prompts must be a sequence of prompts, got None"),
        ([[1]], None, "params must be SamplingParams, or one for each prompt, got None"),
    ],
)
def test_what_is_no_sequence_of_prompts_is_refused(prompts, params, message):
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=message):
        engine.generate(prompts, params)
    assert engine.stats.submitted == 0


def test_a_text_alone_is_one_prompt():
    engine = make_engine(tokenizer=BytePairs())
    engine.generate("hello", SamplingParams(4))
    assert engine.stats.submitted == 1
    with pytest.raises(InvalidRequest, match="text needs an engine with a tokenizer"):
        make_engine().generate("hello")


def test_aborting_works_at_any_point_and_returns_everything():
    prompts = token_tree((1, 60), (3, 20))
    for steps_before in range(8):
        engine = make_engine(prefill_tokens=32, max_running=2)
        handles = [engine.submit(prompt, SamplingParams(9)) for prompt in prompts]
        for _ in range(steps_before):
            engine.step()
        victim = handles[steps_before % 3]
        victim.abort()
        victim.abort()
        engine.check()
        assert victim.finish_reason == "abort"
        others = [handle for handle in handles if handle is not victim]
        assert run(others) == [greedy_without_cache(handle.prompt, 9) for handle in others]
        assert engine.stats.aborted == 1
        assert_all_returned(engine)


def test_leaving_a_stream_aborts_its_request():
    [prompt] = token_tree((1, 20))
    engine = make_engine()
    handle = engine.submit(prompt, SamplingParams(30))
    for event in handle.stream():
        assert event.finish_reason is None
        break
    assert handle.finish_reason == "abort"
    outputs = engine.generate([prompt, prompt], SamplingParams(4))
    next(outputs)
    outputs.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not engine.has_work
    assert_all_returned(engine)


@pytest.mark.parametrize("leave", [lambda iterator: iterator.close(), lambda iterator: None])
def test_leaving_an_iteration_before_it_begins_aborts_too(leave):
    engine = make_engine()
    handle = engine.submit([1, 2, 3], SamplingParams(30))
    leave(handle.stream())
    assert handle.finish_reason == "abort"
    leave(engine.generate([[1, 2, 3]] * 3, SamplingParams(4, n=2)))
    assert engine.stats.aborted == engine.stats.submitted == 7
    assert_all_returned(engine)


def test_closing_ends_streams_and_refuses_more():
    [prompt] = token_tree((1, 20))
    with make_engine() as engine:
        handles = [engine.submit(prompt, SamplingParams(30)) for _ in range(3)]
        samples = engine.submit_samples(prompt, SamplingParams(30, n=3))
        engine.step()
    for handle in [*handles, *samples]:
        assert handle.finish_reason == "error"
        assert isinstance(handle.error, EngineClosed)
        with pytest.raises(RequestFailed, match="closed"):
            list(handle.stream())
        with pytest.raises(RequestFailed, match="closed"):
            handle.result()
    for call in (
        lambda: engine.submit(prompt),
        lambda: engine.generate([prompt]),
        lambda: engine.pin(prompt),
        engine.step,
        handles[0].fork,
    ):
        with pytest.raises(EngineClosed):
            call()
    engine.close()
    assert_all_returned(engine)


def test_salts_share_nothing():
    [prompt] = token_tree((1, 64))
    engine = make_engine()
    one, two, again = (
        engine.submit(prompt, SamplingParams(4), salt=salt) for salt in ("a", "b", "a")
    )
    assert run([one, two, again]) == [greedy_without_cache(prompt, 4)] * 3
    assert engine.stats.prefill_tokens == 64 + 64 + 1
    assert engine.stats.prompts.salt == 64
    engine.check()


@pytest.mark.parametrize("prefill_first", [True, False])
def test_a_batch_may_be_prefilled_as_a_whole_first(prefill_first):
    prompts = token_tree((1, 20), (4, 30))
    engine = make_engine(num_chunks=200, prefill_tokens=32, prefill_first=prefill_first)
    handles = [engine.submit(prompt, SamplingParams(12)) for prompt in prompts]
    most = 0
    while not all(handle.tokens for handle in handles):
        engine.step()
        most = max(len(handle.tokens) for handle in handles)
    assert (most == 1) == prefill_first
    assert run(handles) == [greedy_without_cache(prompt, 12) for prompt in prompts]
    assert_all_returned(engine)


def test_a_pinned_prefix_survives_what_evicts_the_rest():
    [prompt] = token_tree((1, 40))
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    pinned = engine.pin(prompt)
    assert pinned.num_tokens == 32
    engine.run()
    assert pinned.computed
    for other in token_tree((6, 70), seed=1):
        run([engine.submit(other, SamplingParams(4))])
    assert engine.stats.evictions > 0
    computed = engine.stats.prefill_tokens
    assert run([engine.submit(prompt, SamplingParams(4))]) == [greedy_without_cache(prompt, 4)]
    assert engine.stats.prefill_tokens - computed == 8
    pinned.release()
    pinned.release()
    assert_all_returned(engine)


def test_pins_that_leave_too_little_room_are_refused():
    [prompt] = token_tree((1, 64))
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    with pytest.raises(InvalidRequest, match="fills no chunk"):
        engine.pin(prompt[:15])
    waiting = engine.submit([7] * 92, SamplingParams(30))
    with pytest.raises(PoolExhausted, match="with this prefix pinned"):
        engine.pin(prompt)
    assert engine.stats.pinned == 0
    waiting.abort()
    engine.pin(prompt)
    with pytest.raises(PoolExhausted, match="4 pinned for others"):
        engine.submit([7] * 92, SamplingParams(30))
    handle = engine.submit(prompt, SamplingParams(30))
    assert run([handle]) == [greedy_without_cache(prompt, 30)]
    engine.check()


@pytest.mark.slow
def test_half_precision_pools_decode():
    """Not the same tokens (that is promised for float32), but the same first ones."""
    prompts = token_tree((1, 64), (2, 9))
    wide = run([make_engine().submit(prompt, SamplingParams(1)) for prompt in prompts])
    for dtype in ("float16", "bfloat16"):
        with Engine(toy_model(), CacheConfig(50, 16, dtype)) as engine:
            outputs = list(engine.generate(prompts, SamplingParams(max_tokens=6)))
        tokens = [output.samples[0].tokens for output in outputs]
        assert [each[:1] for each in tokens] == [tuple(each) for each in wide]
        assert [len(each) for each in tokens] == [6, 6]


@pytest.mark.slow
def test_chunks_needed_is_enough_and_no_less():
    prompts = token_tree((1, 64), (6, 8))
    assert chunks_needed(prompts, 9, chunk_size=16) == 4 + 6
    assert chunks_needed(prompts, 9, chunk_size=16, sharing=False) == 6 * 5
    engine = make_engine(num_chunks=10, prefill_tokens=32)
    assert run([engine.submit(prompt, SamplingParams(9)) for prompt in prompts]) == [
        greedy_without_cache(prompt, 9) for prompt in prompts
    ]
    assert engine.stats.preemptions == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"implementation": "cuda"},
            "unknown implementation 'cuda'; known: batch_invariant, native, ",
        ),
        ({"steps_per_call": 0}, "steps_per_call must be at least 1, got 0"),
        ({"max_running": 0}, "max_running must be at least 1, got 0"),
        ({"prefill_tokens": 100}, r"prefill_tokens must be one of \(32, 128, 512\), got 100"),
        ({"stop_tokens": range(17)}, "stop_tokens must be at most 16 tokens, got 17"),
        ({"stop_tokens": [None]}, "each of stop_tokens must be an integer .* got None"),
        ({"stop_tokens": [True]}, "each of stop_tokens must be an integer .* got True"),
        ({"stop_tokens": [2**40]}, "each of stop_tokens must be an integer .* got 1099511627776"),
        ({"stop_tokens": [-1]}, "each of stop_tokens must be an integer from 0 .* got -1"),
        ({"stop_tokens": "</s>"}, "stop_tokens must be a sequence of token ids, got '</s>'"),
        ({"stop_tokens": 2}, "stop_tokens must be a sequence of token ids, got 2"),
        ({"stop_tokens": [2, 256]}, "stop_tokens names token 256; .* from 0 to 255"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_engine(**options)
