"""An engine serves the weights that its model had when it was made, and says when they are gone."""

from __future__ import annotations

import gc

import chex
import jax
import pytest
from flax import nnx

import models
from jax_chunkattn import EngineClosed, RequestFailed, SamplingParams
from jax_chunkattn.device import device as device_module
from jax_chunkattn.device import invocations
from jax_chunkattn.device import programs as programs_module
from jax_chunkattn.device.decode_loop import decode_steps
from jax_chunkattn.device.prefill import prefill_step
from jax_chunkattn.device.programs import Programs
from tests.jax_chunkattn.engine.engines import make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache

PROMPT = [3, 1, 4, 1, 5]


def trained(model, donate):
    """A trainer's step; most donate the parameters."""
    state = nnx.state(model)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 1.5, state), donate_argnums=donate)
    nnx.update(model, step(state))


def test_new_weights_do_not_reach_an_engine_whatever_is_reset(monkeypatch):
    """And a new engine, which has them, needs no new programs; nor does one that is reset."""
    monkeypatch.setattr(device_module, "PROGRAMS", Programs())
    traced_once = chex.assert_max_traces(decode_steps, n=1)
    monkeypatch.setattr(invocations, "decode_steps", traced_once)
    traced_once = chex.assert_max_traces(prefill_step, n=1)
    monkeypatch.setattr(invocations, "prefill_step", traced_once)
    model = models.load("random:tiny").model
    engine = make_engine(model=model)
    expected = greedy_without_cache(PROMPT, 12)
    assert run([engine.submit(PROMPT, SamplingParams(12))]) == [expected]
    trained(model, donate=())
    engine.reset()
    assert run([engine.submit(PROMPT, SamplingParams(12))]) == [expected]
    [new] = run([make_engine(model=model).submit(PROMPT, SamplingParams(12))])
    assert new != expected


def test_an_engine_whose_weights_were_donated_closes_and_names_the_cause():
    model = models.load("random:tiny").model
    engine = make_engine(model=model)
    running = [engine.submit(PROMPT, SamplingParams(30)) for _ in range(2)]
    while not running[0].tokens:
        engine.step()
    trained(model, donate=0)
    for handle in running:
        with pytest.raises(RequestFailed, match=r"arrays of the model .* donated") as failed:
            handle.result()
        assert isinstance(failed.value.__cause__, EngineClosed)
    for call in (lambda: engine.submit(PROMPT), engine.step, lambda: engine.pin(PROMPT * 4)):
        with pytest.raises(EngineClosed, match="make a new engine"):
            call()
    assert (engine.stats.recoveries, engine.stats.failed) == (0, 2)
    assert not engine.has_work
    engine.check()


def test_what_compiled_once_is_there_for_an_engine_as_long_as_it_lives(monkeypatch):
    """However many other engines the process has had meanwhile."""
    programs = Programs(most=1)
    monkeypatch.setattr(device_module, "PROGRAMS", programs)
    monkeypatch.setattr(programs_module, "PROGRAMS", programs)
    engine = make_engine()
    run([engine.submit(PROMPT, SamplingParams(4))])
    compilations = engine.stats.compilations
    assert compilations > 1
    other = make_engine()
    run([other.submit(PROMPT, SamplingParams(4))])
    assert other.stats.compilations == 0
    run([engine.submit(PROMPT, SamplingParams(4))])
    assert engine.stats.compilations == compilations
    engine.close()
    del engine, other
    gc.collect()
    third = make_engine()
    run([third.submit(PROMPT, SamplingParams(4))])
    assert third.stats.compilations == compilations
