"""Learned prefixes: tokens are those of a model that reads the keys and values it was given."""

from __future__ import annotations

import numpy as np
import pytest

from jax_chunkattn import (
    EngineClosed,
    HeadClusters,
    InvalidPrefix,
    InvalidRequest,
    KVEvents,
    PoolExhausted,
    Router,
    SamplingParams,
    beam_search,
)
from pallas_kernels.selection import ChunkSelector
from tests.jax_chunkattn.engine.behind import (
    chained,
    greedy_behind,
    joined,
    logits_behind,
    prefix_of,
)
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine, run
from tests.jax_chunkattn.engine.test_interrupts import interrupted_at
from tests.jax_chunkattn.toy import (
    greedy_without_cache,
    reweighted,
    token_tree,
    toy_model,
    windowed_model,
)

PROMPTS = token_tree((1, 21), (2, 9), seed=3)
OWN, TOKENS = prefix_of(32, 1), 12
PARAMS = SamplingParams(TOKENS)


def use_of(handle):
    assert handle.prompt_use is not None
    return handle.prompt_use


def wanted(prompt=PROMPTS[0], prefix=OWN):
    return greedy_behind(prefix, prompt, TOKENS)


def test_tokens_are_those_of_dense_attention_behind_the_given_keys_and_values():
    with make_engine() as engine:
        handle = engine.add_prefix("own", *OWN)
        assert (handle.name, handle.num_tokens, handle.written) == ("own", 32, False)
        first = engine.submit(PROMPTS[0], PARAMS, prefix="own")
        assert run([first]) == [wanted()]
        assert wanted() != greedy_without_cache(PROMPTS[0], TOKENS)
        assert handle.written
        assert (first.prompt, first.prefix) == (tuple(PROMPTS[0]), "own")
        other, without = (
            engine.submit(PROMPTS[1], PARAMS, prefix="own"),
            engine.submit(PROMPTS[0], PARAMS),
        )
        assert run([other, without]) == [
            wanted(PROMPTS[1]),
            greedy_without_cache(PROMPTS[0], TOKENS),
        ]
        # What is counted is the user's: nothing virtual is computed, found or missed.
        assert use_of(other).num_tokens == len(PROMPTS[1])
        assert use_of(other).hit + use_of(other).copied == 21
        assert use_of(without).hit + use_of(without).copied == 0
        assert use_of(without).salt == 16  # computed before, but behind other keys
        assert engine.stats.prompts.num_tokens == sum(map(len, (*PROMPTS, PROMPTS[0])))
        handle.release()
        assert_all_returned(engine)


def test_chains_share_what_they_begin_with_and_any_number_are_in_one_batch():
    names = {f"label {number}": number for number in range(1, 7)}
    with make_engine() as engine:
        chained(engine, **names)
        handles = [engine.submit(PROMPTS[0], PARAMS, prefix=name) for name in names]
        handles.append(engine.submit(PROMPTS[0], PARAMS, prefix="general"))
        handles.append(engine.submit(PROMPTS[0], PARAMS))
        while not all(handle.tokens for handle in handles):
            engine.step()
        chains = {handle.chunk_ids[:2] for handle in handles[:6]}
        assert len(chains) == 6
        assert len({general for general, _ in chains}) == 1
        general = prefix_of(16, 7)
        assert run(handles) == [
            *(wanted(prefix=joined(general, prefix_of(16, seed))) for seed in names.values()),
            wanted(prefix=general),
            greedy_without_cache(PROMPTS[0], TOKENS),
        ]
        assert (engine.stats.pinned, engine.stats.learned_prefixes) == (7, 7)


def test_each_is_read_once_for_all_its_rows():
    labels = {f"label {number}": number for number in range(1, 7)}
    with make_engine(max_running=24, prefill_first=True) as engine:
        chained(engine, **labels)
        handles = [
            engine.submit([row, number], SamplingParams(4), prefix=name)
            for row in range(4)
            for name, number in labels.items()
        ]
        run(handles)
        stats = engine.stats
    assert stats.calls
    assert stats.planned_reads == stats.calls * (1 + 6)  # the general one, and each label's
    assert stats.planned_reads_unshared == stats.calls * 24 * 2
    assert stats.plan is not None
    assert stats.plan.shared


def test_equal_contents_are_one_whatever_their_names():
    with make_engine() as engine:
        one, same = engine.add_prefix("one", *OWN), engine.add_prefix("same", *OWN)
        assert one.token_ids == same.token_ids
        other = engine.add_prefix("other", OWN[0], OWN[1] + np.float32(1e-3))
        assert not set(one.token_ids) & set(other.token_ids)
        handles = [engine.submit(PROMPTS[0], PARAMS, prefix=name) for name in ("one", "same")]
        assert run(handles) == [wanted()] * 2
        assert engine.stats.prompts.hit  # the second found the first one's


def test_samples_forks_and_beams_go_on_behind_it():
    with make_engine() as engine:
        engine.add_prefix("own", *OWN)
        parent = engine.submit(PROMPTS[0], PARAMS, prefix="own", hold=True)
        while len(parent.tokens) < 4:
            engine.step()
        assert run([parent.fork(PARAMS), parent]) == [wanted()] * 2
        longer = parent.fork(SamplingParams(TOKENS + 1))
        assert run([longer]) == [greedy_behind(OWN, PROMPTS[0], TOKENS + 1)]
        samples = engine.submit_samples(PROMPTS[0], SamplingParams(TOKENS, n=2), prefix="own")
        assert run(samples) == [wanted()] * 2
        [output] = engine.generate([PROMPTS[0]], PARAMS, prefix="own")
        assert list(output.samples[0].tokens) == wanted()
        assert output.prompt == tuple(PROMPTS[0])
        [best] = beam_search(engine, PROMPTS[0], beams=1, max_tokens=TOKENS, prefix="own")
        assert list(best.tokens) == wanted()
        chosen = engine.submit(PROMPTS[0], PARAMS, prefix="own", chosen=wanted()[:5])
        assert run([chosen]) == [wanted()]


def test_penalties_count_no_virtual_token():
    params = SamplingParams(TOKENS, repetition_penalty=1.4, logprobs=0)
    with make_engine() as engine:
        engine.add_prefix("own", *OWN)
        done = engine.submit(PROMPTS[0], params, prefix="own").result()
    tokens = list(PROMPTS[0])
    for token in done.tokens:
        logits = logits_behind(OWN, tokens)[-1]
        seen = np.isin(np.arange(len(logits)), tokens)
        penalised = np.where(seen, np.where(logits > 0, logits / 1.4, logits * 1.4), logits)
        assert penalised[token] == pytest.approx(penalised.max(), abs=1e-5)
        tokens.append(token)


def test_scores_are_of_what_the_model_says_behind_it():
    continuations = [[5, 6, 7], [5, 6, 9, 11]]
    with make_engine() as engine:
        engine.add_prefix("own", *OWN)
        for _ in range(2):  # computed, and cached
            scores = engine.score(PROMPTS[0], continuations, learned="own")
            for continuation, score in zip(continuations, scores, strict=True):
                logits = logits_behind(OWN, [*PROMPTS[0], *continuation]).astype(np.float64)
                logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
                begin = len(PROMPTS[0]) - 1
                expected = [logits[begin + at, token] for at, token in enumerate(continuation)]
                assert score.tokens == tuple(continuation)
                found = [token.chosen for token in score.logprobs]
                np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_prompt_is_pinned_behind_it():
    with make_engine() as engine:
        learned = engine.add_prefix("own", *OWN)
        pinned = engine.pin(PROMPTS[0], prefix="own")
        assert pinned.num_tokens == 16
        engine.run()
        assert pinned.computed
        handle = engine.submit(PROMPTS[0], PARAMS, prefix="own")
        assert run([handle]) == [wanted()]
        assert use_of(handle).hit == 16
        pinned.release()
        learned.release()
        assert_all_returned(engine)


def test_it_is_written_again_after_reset_new_weights_and_lost_pools():
    with make_engine() as engine:
        handle = engine.add_prefix("own", *OWN)
        assert run([engine.submit(PROMPTS[0], PARAMS, prefix="own")]) == [wanted()]
        engine.reset()
        assert not handle.written
        assert run([engine.submit(PROMPTS[0], PARAMS, prefix="own")]) == [wanted()]
        running = engine.submit(PROMPTS[1], PARAMS, prefix="own")
        engine.step()
        engine._core.recover(RuntimeError("the pool is lost"))  # as an error in a turn does
        assert run([running]) == [wanted(PROMPTS[1])]
        assert engine.stats.recoveries == 1
        assert handle.written
        other = reweighted(toy_model())
        engine.update_weights(other)
        assert run([engine.submit(PROMPTS[0], PARAMS, prefix="own")]) == [
            greedy_behind(OWN, PROMPTS[0], TOKENS, model=other)
        ]
        engine.check()


@pytest.mark.slow
def test_an_interrupt_anywhere_leaves_it_as_it_was():
    """In steps; the moments that are met are other ones each time."""
    wait = SamplingParams(4)
    with make_engine() as engine:
        engine.add_prefix("own", *OWN)
        run([engine.submit(PROMPTS[0], wait, prefix="own")])
        interrupted = set()
        for number in range(1, 20_000, 83):
            engine.reset()
            function = interrupted_at(
                number, lambda: engine.submit(PROMPTS[1], wait, prefix="own").result()
            )
            if function is None:
                break
            interrupted.add(function)
            again = engine.submit(PROMPTS[0], wait, prefix="own")
            assert run([again]) == [wanted()[:4]], function
            engine.check()
        assert len(interrupted) > 10


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.slow
def test_other_implementations_read_it(implementation):
    with make_engine(implementation=implementation) as engine:
        chained(engine, one=1, two=2)
        handles = [engine.submit(PROMPTS[0], PARAMS, prefix=name) for name in ("one", "two")]
        general = prefix_of(16, 7)
        expected = [wanted(prefix=joined(general, prefix_of(16, seed))) for seed in (1, 2)]
        assert run(handles) == expected


@pytest.mark.slow
def test_twenty_virtual_tokens_fill_chunks_of_twenty():
    with make_engine(60, 20) as engine:
        engine.add_prefix("own", *prefix_of(20))
        found = run([engine.submit(PROMPTS[0], PARAMS, prefix="own")])
    assert found == [wanted(prefix=prefix_of(20))]


@pytest.mark.slow
def test_windows_slide_over_it_as_over_other_tokens():
    model = windowed_model()
    with make_engine(model=model, window_chunks=200) as engine:
        engine.add_prefix("own", *OWN)
        found = run([engine.submit(PROMPTS[0], PARAMS, prefix="own")])
    assert found == [greedy_behind(OWN, PROMPTS[0], TOKENS, model=model)]
    assert found != [wanted()]


def test_it_stays_while_others_come_and_go_and_leaves_when_it_is_released():
    with make_engine(num_chunks=10, max_running=3) as engine:
        handle = engine.add_prefix("own", *OWN)
        [stranger] = token_tree((1, 90), seed=8)
        for _ in range(2):
            engine.submit(stranger, SamplingParams(30)).result()
        assert engine.stats.evictions
        assert handle.written
        with pytest.raises(PoolExhausted, match="2 pinned for others"):
            engine.submit(stranger, SamplingParams(60))
        running = engine.submit(PROMPTS[0], SamplingParams(60), prefix="own")
        engine.step()
        handle.release()
        handle.release()
        assert (engine.stats.pinned, engine.stats.learned_prefixes) == (0, 0)
        with pytest.raises(InvalidRequest, match="no learned prefix 'own'"):
            engine.submit(PROMPTS[0], PARAMS, prefix="own")
        older = engine.submit(stranger[:40], SamplingParams(90), priority=-1)  # sends it back
        assert run([running]) == [greedy_behind(OWN, PROMPTS[0], 60)]
        assert engine.stats.preemptions
        older.result()
        assert_all_returned(engine)


def test_salts_have_copies_of_their_own_which_are_no_ones_business():
    with make_engine() as engine:
        engine.add_prefix("own", *OWN)
        mine = engine.submit(PROMPTS[0], PARAMS, prefix="own", salt="mine")
        yours = engine.submit(PROMPTS[0], PARAMS, prefix="own", salt="yours")
        while not (mine.tokens and yours.tokens):
            engine.step()
        assert not set(mine.chunk_ids) & set(yours.chunk_ids)
        assert run([mine, yours]) == [wanted()] * 2
        assert use_of(yours).hit == 0


def test_a_salts_copy_that_was_evicted_is_written_again():
    [stranger] = token_tree((1, 90), seed=8)
    with make_engine(num_chunks=10, max_running=3) as engine:
        engine.add_prefix("own", *OWN)
        assert run([engine.submit(PROMPTS[0], PARAMS, prefix="own", salt="mine")]) == [wanted()]
        engine.submit(stranger, SamplingParams(30)).result()
        assert engine.stats.evictions
        again = engine.submit(PROMPTS[0], PARAMS, prefix="own", salt="mine")
        assert run([again]) == [wanted()]
        assert use_of(again).evicted == 16
        assert engine.stats.prefill_tokens == 2 * len(PROMPTS[0]) + len(stranger)


def test_events_name_virtual_tokens_by_ids_that_routers_can_be_asked_for():
    events, router = KVEvents(), Router(chunk_size=16)
    with make_engine(kv_events=events) as engine:
        router.add("a")
        router.add("b")
        prefix = engine.add_prefix("own", *OWN)
        assert min(prefix.token_ids) >= toy_model().vocab_size
        engine.submit(PROMPTS[0], PARAMS, prefix="own").result()
        router.apply("b", events.take())
        routed = router.route((*prefix.token_ids, *PROMPTS[0]))
        assert (routed.replica, routed.found_tokens) == ("b", 32 + 16)
        assert router.route(PROMPTS[0]).found_tokens == 0


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((OWN[0][:, :, :20], OWN[1][:, :, :20]), "20 virtual tokens, and chunks have 16.*20, 10"),
        ((OWN[0][:, :, :0], OWN[1][:, :, :0]), "0 virtual tokens"),
        ((OWN[0], OWN[1][:, :, :16]), "keys of 32 tokens and values of 16"),
        ((OWN[0][1:], OWN[1]), "have shape"),
        ((OWN[0], OWN[1] * np.float32(np.nan)), "values of prefix 'x' are not all finite"),
        (("keys", OWN[1]), "no array of numbers"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_changes(arrays, message):
    with make_engine() as engine:
        with pytest.raises(InvalidPrefix, match=message):
            engine.add_prefix("x", *arrays)
        assert_all_returned(engine)


def test_names_positions_and_closed_engines_are_refused():
    with make_engine() as engine:
        engine.add_prefix("own", *OWN)
        with pytest.raises(InvalidPrefix, match="'own' already"):
            engine.add_prefix("own", *OWN)
        with pytest.raises(InvalidPrefix, match="a name"):
            engine.add_prefix("", *OWN)
        with pytest.raises(InvalidRequest, match="no learned prefix 'none'; there are: 'own'"):
            engine.add_prefix("more", *OWN, after="none")
        most = toy_model().max_positions
        with pytest.raises(InvalidRequest, match="30 tokens behind 32 virtual ones and asks"):
            engine.submit(PROMPTS[0], SamplingParams(most - 61), prefix="own")
        with pytest.raises(InvalidRequest, match="behind 32 virtual ones"):
            engine.score([1] * (most - 33), [[1, 2, 3]], learned="own")
        with pytest.raises(InvalidRequest, match="behind 32 virtual ones"):
            engine.pin([1] * (most - 31), prefix="own")
        with pytest.raises(InvalidRequest, match="token id"):
            engine.submit([engine.add_prefix("b", *prefix_of(16)).token_ids[0]], PARAMS)
    with pytest.raises(EngineClosed):
        engine.add_prefix("late", *OWN)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": HeadClusters((2, 3))}, "clusters"),
        ({"model": windowed_model(), "window_chunks": 60}, "window_chunks as num_chunks"),
        ({"chunk_size": 2}, "at least 4 tokens"),
    ],
)
def test_pools_that_cannot_have_it_say_so(options, message):
    with make_engine(**options) as engine, pytest.raises(InvalidPrefix, match=message):
        engine.add_prefix("own", *OWN)


@pytest.mark.slow
def test_it_is_there_in_a_pool_of_another_size():
    with make_engine(12, max_running=3) as engine:
        handle = engine.add_prefix("own", *OWN)
        running = engine.submit(PROMPTS[0], PARAMS, prefix="own")
        engine.step()
        engine.resize(num_chunks=20)
        assert run([running]) == [wanted()]
        assert handle.written
        with pytest.raises(PoolExhausted):
            engine.resize(num_chunks=1)
        assert run([engine.submit(PROMPTS[1], PARAMS, prefix="own")]) == [wanted(PROMPTS[1])]
        handle.release()
        assert engine.stats.pinned == 0


@pytest.mark.slow
def test_a_size_that_gives_windows_chunks_of_their_own_is_refused():
    with make_engine(60, model=windowed_model(), window_chunks=60) as engine:
        handle = engine.add_prefix("own", *OWN)
        done = engine.submit(PROMPTS[0], SamplingParams(2), prefix="own")
        first = run([done])
        with pytest.raises(InvalidPrefix, match="a pool of 200, and a learned prefix, 'own'"):
            engine.resize(num_chunks=200)
        assert run([engine.submit(PROMPTS[0], SamplingParams(2), prefix="own")]) == first
        handle.release()
        engine.resize(num_chunks=200)
        with pytest.raises(InvalidPrefix, match="has one for all heads"):
            done.fork(SamplingParams(9))
        with pytest.raises(InvalidPrefix, match="has one for all heads"):
            engine.add_prefix("own", *OWN)


@pytest.mark.slow
def test_what_is_behind_it_comes_back_from_tiers_behind_equal_keys_and_values_alone(tmp_path):
    on_disk = {"disk": tmp_path, "disk_memory": "1GB", "load": "always"}
    prompt, params = token_tree((1, 70), seed=9)[0], SamplingParams(8)
    other = prefix_of(32, 11)
    for prefix, loaded in ((OWN, 0), (OWN, 64), (other, 0), (other, 64)):
        with make_engine(**on_disk) as engine:
            engine.add_prefix("whatever its name", *prefix)
            done = engine.submit(prompt, params, prefix="whatever its name")
            assert run([done]) == [greedy_behind(prefix, prompt, 8)]
            tiers = engine.stats.tiers
            assert tiers is not None
            assert tiers.loaded_from_disk == loaded
            assert use_of(done).num_tokens == len(prompt)
    [stranger] = token_tree((1, 90), seed=8)
    with make_engine(num_chunks=12, max_running=3, host_memory="1MB", load="always") as engine:
        engine.add_prefix("own", *OWN)
        for _ in range(2):
            found = run([engine.submit(prompt, params, prefix="own", salt="mine")])
            assert found == [greedy_behind(OWN, prompt, 8)]
            assert run([engine.submit(stranger, params)]) == [greedy_without_cache(stranger, 8)]
        tiers = engine.stats.tiers
        assert tiers is not None
        assert tiers.loaded_from_host


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"codec": "int8"}, marks=pytest.mark.slow),
        pytest.param({"selector": ChunkSelector(0.4)}, marks=pytest.mark.slow),
    ],
    ids=["exact", "codec", "selector"],
)
def test_nothing_is_compiled_after_warm_up(options):
    with make_engine(**options) as engine:
        engine.warm_up(scores=True)
        before = engine.stats.compilations
        chained(engine, one=1, two=2)
        names = ("one", "two", "general", None)
        handles = [engine.submit(PROMPTS[0], PARAMS, prefix=name) for name in names]
        engine.score(PROMPTS[0], [[1, 2], [3]], learned="one")
        assert all(run(handles))
        engine.reset()
        run([engine.submit(PROMPTS[0], PARAMS, prefix="two", salt="other")])
        assert engine.stats.compilations == before
