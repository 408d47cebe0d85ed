"""New weights in a running engine: no key of the old ones is read, and nothing is compiled."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from jax_chunkattn import EngineClosed, InvalidWeights, RequestFailed, SamplingParams
from jax_chunkattn.device import weights as weights_module
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_scoring import assert_right
from tests.jax_chunkattn.toy import greedy_without_cache, reweighted, token_tree, toy_model

PROMPTS = token_tree((1, 40), (4, 9))
PARAMS = SamplingParams(40)


def other_model():
    return reweighted(toy_model())


@cache
def expected(prompt: tuple[int, ...], count: int, new: bool) -> list[int]:
    return greedy_without_cache(prompt, count, model=other_model() if new else toy_model())


def answers(engine, prompts=PROMPTS):
    return run([engine.submit(prompt, PARAMS) for prompt in prompts])


def test_what_comes_after_reads_nothing_of_the_old_and_needs_no_program():
    engine = make_engine()
    assert answers(engine) == [expected(tuple(prompt), 40, new=False) for prompt in PROMPTS]
    before = engine.stats
    engine.update_weights(other_model())
    assert answers(engine) == [expected(tuple(prompt), 40, new=True) for prompt in PROMPTS]
    after = engine.stats
    assert after.compilations == before.compilations
    assert (before.weights_version, after.weights_version) == (0, 1)
    assert after.prefill_tokens - before.prefill_tokens == before.prefill_tokens
    engine.update_weights(nnx.state(toy_model()))
    completion = engine.submit(PROMPTS[0], PARAMS).result()
    assert list(completion.tokens) == expected(tuple(PROMPTS[0]), 40, new=False)
    assert completion.weights == (2,)
    assert_all_returned(engine)


def test_the_weights_that_are_served_are_there_to_read():
    engine = make_engine()
    for model in (toy_model(), other_model()):
        if model is not toy_model():
            engine.update_weights(model)
        expected = weights_module.named_leaves(nnx.state(model))
        assert engine.weights.keys() == expected.keys()
        for name, served in engine.weights.items():
            np.testing.assert_array_equal(served, expected[name])


def test_who_runs_goes_on_by_the_new_ones_behind_what_the_old_ones_chose():
    engine = make_engine(max_running=3)
    handles = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    while len(handles[0].tokens) < 8:
        engine.step()
    engine.update_weights(other_model())
    chosen = [list(handle.tokens) for handle in handles]
    assert [bool(tokens) for tokens in chosen] == [True, True, True, False]
    for handle, prompt, old in zip(handles, PROMPTS, chosen, strict=True):
        completion = handle.result()
        assert old == expected(tuple(prompt), len(old), new=False)
        rest = expected((*prompt, *old), 40 - len(old), new=True)
        assert list(completion.tokens) == [*old, *rest]
        assert completion.weights == ((0, 1) if old else (1,))
    assert engine.stats.recoveries == 0
    assert_all_returned(engine)


def test_who_runs_may_finish_by_the_old_ones_while_others_wait():
    engine = make_engine(max_running=2, num_chunks=10)  # which preempts one of them
    handles = [engine.submit(prompt, PARAMS) for prompt in PROMPTS]
    while len(handles[1].tokens) < 8:
        engine.step()
    engine.update_weights(other_model(), running="finish")
    assert [handle.done for handle in handles] == [True, True, False, False]
    found = run(handles)
    assert found == [
        expected(tuple(prompt), 40, new=index > 1) for index, prompt in enumerate(PROMPTS)
    ]
    assert [handle.result().weights for handle in handles] == [(0,), (0,), (1,), (1,)]
    assert_all_returned(engine)


def test_pinned_prefixes_and_forks_are_computed_again():
    engine = make_engine()
    pinned = engine.pin(PROMPTS[0][:32])
    parent = engine.submit(PROMPTS[0], SamplingParams(8), hold=True)
    old = list(parent.result().tokens)
    engine.update_weights(other_model())
    fork = parent.fork(SamplingParams(20))
    completion = fork.result()
    assert list(completion.tokens) == old + expected((*PROMPTS[0], *old), 12, new=True)
    assert completion.weights == (0, 1)
    assert pinned.computed
    before = engine.stats.prompts.hit
    answers(engine, PROMPTS[:1])
    assert engine.stats.prompts.hit - before >= 32
    parent.release()
    pinned.release()
    assert_all_returned(engine)


def test_scores_are_those_of_the_new_ones():
    engine = make_engine(prefill_tokens=32)
    prefix, continuations = PROMPTS[0], [PROMPTS[1][-9:], PROMPTS[2][-9:]]
    engine.score(prefix, continuations)
    engine.update_weights(other_model())
    assert_right(engine.score(prefix, continuations), prefix, continuations, other_model())


def state_of(model, **changed):
    state = nnx.to_pure_dict(nnx.state(model))
    state.update(changed)
    return state


def deleted():
    array = jnp.zeros_like(toy_model().embedding[...])
    array.delete()
    return array


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda: state_of(other_model(), embedding=np.zeros((3, 4), np.float32)), "embedding has"),
        (lambda: state_of(other_model(), another=np.zeros(3)), "nothing is named another"),
        (lambda: {"embedding": np.zeros(3)}, r"there is no .* and \d more"),
        (lambda: state_of(other_model(), final_norm="x"), "final_norm is no array"),
        (lambda: state_of(other_model(), final_norm=np.zeros(64, np.int32)), "final_norm is of"),
        (lambda: state_of(other_model(), embedding=deleted()), "embedding has been deleted"),
        (lambda: models.load("random:small").model, "has the shape"),
    ],
)
def test_what_does_not_fit_is_refused_whole(change, error):
    engine = make_engine()
    with pytest.raises(InvalidWeights, match=error):
        engine.update_weights(change())
    assert engine.stats.weights_version == 0
    assert answers(engine, PROMPTS[:1]) == [expected(tuple(PROMPTS[0]), 40, new=False)]


def test_a_checkpoints_arrays_in_another_type_do():
    engine = make_engine()
    half = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), state_of(other_model()))
    engine.update_weights(half)
    model = models.load("random:tiny").model
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), half))
    assert answers(engine, PROMPTS[:1]) == [greedy_without_cache(PROMPTS[0], 40, model=model)]
    with pytest.raises(ValueError, match="running must be"):
        engine.update_weights(half, running="now")  # pyright: ignore[reportArgumentType]


def test_a_trainer_may_donate_what_it_gave():
    model = models.load("random:tiny").model
    engine = make_engine(model=model)
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(other_model())))
    engine.update_weights(model)
    for array in jax.tree.leaves(nnx.state(model)):
        array.delete()
    assert answers(engine, PROMPTS[:1]) == [expected(tuple(PROMPTS[0]), 40, new=True)]


def live_bytes() -> int:
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def test_one_array_more_is_there_at_most(monkeypatch):
    model = models.load("random:tiny").model
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))]
    new = jax.tree.map(np.asarray, state_of(other_model()))  # on the host, as a file's are
    engine = make_engine(model=model)
    del model
    engine.update_weights(new)  # whose arrays are the engine's own
    most, copy = [live_bytes()], weights_module._copy

    def watched(value, like):
        copied = copy(value, like)
        most.append(live_bytes())
        return copied

    monkeypatch.setattr(weights_module, "_copy", watched)
    engine.update_weights(new)
    assert max(most) <= most[0] + max(sizes)
    assert live_bytes() == most[0]


def failing_at(number, error, monkeypatch):
    """Has the copy of that number fail, once."""
    copy, calls = weights_module._copy, []

    def fail(value, like):
        calls.append(value)
        if len(calls) == number:
            raise error
        return copy(value, like)

    monkeypatch.setattr(weights_module, "_copy", fail)


def test_without_room_for_an_array_the_old_ones_are_served(monkeypatch):
    engine = make_engine()
    failing_at(1, MemoryError("no room"), monkeypatch)
    with pytest.raises(MemoryError, match="no room"):
        engine.update_weights(other_model())
    assert answers(engine, PROMPTS[:1]) == [expected(tuple(PROMPTS[0]), 40, new=False)]
    assert engine.stats.weights_version == 0


def test_an_engine_of_old_and_new_arrays_serves_nobody(monkeypatch):
    engine = make_engine()
    handle = engine.submit(PROMPTS[0], PARAMS)
    failing_at(3, MemoryError("no room"), monkeypatch)
    with pytest.raises(EngineClosed, match="2 of 8 arrays are new: no room"):
        engine.update_weights(other_model())
    with pytest.raises(RequestFailed, match="no room"):
        handle.result()
    with pytest.raises(EngineClosed):
        engine.submit(PROMPTS[0])


def test_ctrl_c_in_the_midst_leaves_all_arrays_new(monkeypatch):
    engine = make_engine()
    handle = engine.submit(PROMPTS[0], PARAMS)
    failing_at(4, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(other_model())
    assert list(handle.result().tokens) == expected(tuple(PROMPTS[0]), 40, new=True)
    assert handle.result().weights == (1,)
    assert engine.stats.weights_version == 1
    assert_all_returned(engine)


def test_ctrl_c_before_any_array_is_new_leaves_the_old_ones(monkeypatch):
    """And nothing of what was given is looked at again."""
    engine = make_engine()
    given = jax.tree.map(jnp.copy, state_of(other_model()))
    failing_at(1, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(given)
    for array in jax.tree.leaves(given):
        array.delete()
    assert answers(engine, PROMPTS[:1]) == [expected(tuple(PROMPTS[0]), 40, new=False)]
    assert engine.stats.weights_version == 0


def calling_once(call):
    """A callback that makes a call at the first event."""
    calls = []

    def on_event(_):
        if not calls:
            calls.append(None)
            calls[0] = call()

    return calls, on_event


@pytest.mark.parametrize("running", ["recompute", "finish"])
def test_scores_of_one_call_are_all_by_the_same_weights(running):
    engine = make_engine(prefill_tokens=32, prefill_first=False)
    _, update = calling_once(lambda: engine.update_weights(other_model(), running=running))
    handle = engine.submit(PROMPTS[3], SamplingParams(60), on_event=update)
    prefix, continuations = PROMPTS[0], [prompt[-9:] * 3 for prompt in PROMPTS[1:]]
    scores = engine.score(prefix, continuations)
    assert {score.weights for score in scores} == {1}
    assert_right(scores, prefix, continuations, other_model())
    handle.result()
    assert_all_returned(engine)


def test_a_callback_may_wait_for_others_while_those_who_run_finish():
    engine = make_engine()
    waited, wait = calling_once(lambda: engine.submit(PROMPTS[1], PARAMS).result())
    handle = engine.submit(PROMPTS[0], PARAMS)
    while not handle.tokens:
        engine.step()
    fork = handle.fork(PARAMS)
    fork._request.on_event = wait
    engine.update_weights(other_model(), running="finish")
    assert list(handle.result().tokens) == expected(tuple(PROMPTS[0]), 40, new=False)
    assert list(waited[0].tokens) == expected(tuple(PROMPTS[1]), 40, new=False)
    assert answers(engine, PROMPTS[:1]) == [expected(tuple(PROMPTS[0]), 40, new=True)]
    assert_all_returned(engine)


def test_ctrl_c_while_those_who_run_finish_holds_nobody_back(monkeypatch):
    engine = make_engine()
    handle = engine.submit(PROMPTS[0], PARAMS)
    while not handle.tokens:
        engine.step()
    with monkeypatch.context() as patch:

        def interrupted(*_, **__):
            raise KeyboardInterrupt

        patch.setattr(engine._core.device, "fetch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.update_weights(other_model(), running="finish")
    assert answers(engine, PROMPTS[1:2]) == [expected(tuple(PROMPTS[1]), 40, new=False)]
    assert list(handle.result().tokens) == expected(tuple(PROMPTS[0]), 40, new=False)


def test_an_engine_that_a_callback_closes_takes_no_weights():
    engine = make_engine()
    _, close = calling_once(engine.close)
    engine.submit(PROMPTS[0], PARAMS, on_event=close)
    engine.step()
    with pytest.raises(EngineClosed):
        engine.update_weights(other_model())
    assert engine.stats.weights_version == 0
