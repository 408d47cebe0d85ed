"""What a tree search refuses, and what is left of one that does not come to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from jax_chunkattn import (
    Beam,
    BestFirst,
    Candidate,
    Continuations,
    EngineClosed,
    InvalidRequest,
    NextTokens,
    PoolExhausted,
    Puct,
    SamplingParams,
    SearchFailed,
    Selected,
    tree_search,
)
from tests.jax_chunkattn.engine.engines import assert_all_returned, make_engine
from tests.jax_chunkattn.engine.test_interrupts import Interrupt, interrupted_at
from tests.jax_chunkattn.toy import token_tree

PROMPT = token_tree((1, 44))[0]


def make(num_chunks: int = 200):
    return make_engine(num_chunks, prefill_tokens=32, max_running=4)


def search(engine, **options):
    options = {"expand": NextTokens(2), "num_simulations": 5, "max_tokens": 20, **options}
    if isinstance(options["expand"], Custom):
        options["evaluate"] = lambda nodes: [0.0] * len(nodes)
    return tree_search(engine, options.pop("prompt", PROMPT), **options)


@dataclass
class Custom:
    """An expansion as tests want it."""

    candidate: Any = field(default_factory=lambda: Candidate(3))
    likeliest: int = 2
    at_root: int = 2

    def num_likeliest(self, depth):
        return self.likeliest if depth else self.at_root

    def candidates(self, node):
        return [Candidate(3)] if node.depth == 0 else [self.candidate]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_simulations": 0}, ValueError, "num_simulations must be at least 1, got 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_depth": 0}, ValueError, "max_depth must be at least 1, or None for no limit, got 0"),
        ({"stop_tokens": range(17)}, ValueError, "stop_tokens must be at most 16, got 17"),
        ({"expand": Custom(at_root=0)}, ValueError, r"num_likeliest\(0\) must be from 1 to 20"),
        ({"expand": Custom(at_root=21)}, ValueError, "must be from 1 to 20, got 21"),
        ({"stop_tokens": [999]}, InvalidRequest, "999"),
        ({"max_tokens": 2000}, InvalidRequest, "asks for 2000 more"),
        ({"max_tokens": 400}, PoolExhausted, "asks for 400 more needs 28 chunks"),
        ({"prompt": [256]}, InvalidRequest, "token id 256"),
        ({"prompt": "text"}, InvalidRequest, "needs an engine with a tokenizer"),
    ],
)
def test_what_can_never_be_searched_is_refused_before_anything_is_computed(options, error, message):
    engine = make(num_chunks=10)
    with pytest.raises(error, match=message):
        search(engine, **options)
    assert engine.stats.submitted == 0


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: Candidate(), "needs a token, or to sample some"),
        (lambda: Candidate(3, -1), "num_sampled=-1"),
        (lambda: Candidate(3, prior=-0.5), "prior must be a number from 0 up, got -0.5"),
        (lambda: Candidate(3, prior=float("nan")), "prior must be a number"),
        (lambda: Candidate(3, sampling=SamplingParams(n=2)), "neither n, stop nor"),
        (lambda: Candidate(3, sampling=SamplingParams(stop="x")), "neither n, stop nor"),
        (lambda: NextTokens(0), "width must be from 1 to 20, got 0"),
        (lambda: Continuations(21), "width must be from 1 to 20, got 21"),
        (lambda: Continuations(2, 1), "num_tokens must be at least 2, got 1"),
        (lambda: Puct(-1.0), "exploration must be from 0 up"),
        (lambda: Puct(batch=0), "batch must be at least 1"),
        (lambda: BestFirst(0), "batch must be at least 1"),
        (lambda: Beam(0), "keep must be at least 1"),
    ],
)
def test_callbacks_that_cannot_be_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": Custom(Candidate(num_sampled=2))}, "node 1 knows its 2 likeliest next tokens"),
        ({"expand": Custom(Candidate(9, 2), 0)}, "nothing could follow it"),
        ({"expand": Custom(likeliest=21)}, r"num_likeliest\(1\) must be from 0 to 20, got 21"),
        ({"expand": Custom(Candidate(999))}, "token id 999"),
        ({"evaluate": lambda nodes: [0.0]}, "a value for each node: 2 of them, got 1"),
        ({"evaluate": lambda nodes: [0.0, float("inf")]}, "finite numbers, got inf for node 2"),
        ({"select": lambda tree: Selected([0, 0])}, "selected twice"),
        ({"select": lambda tree: Selected([0], [0])}, "selected twice"),
        ({"select": lambda tree: Selected([0])}, "selected node 0 of 3"),
        ({"select": lambda tree: Selected([7])}, "selected node 7 of 1"),
        ({"select": lambda tree: Selected([-1])}, "selected node -1 of 1"),
        ({"select": lambda tree: Selected([0], [1])}, "pruned node 1, which is not expandable"),
    ],
)
def test_what_callbacks_cannot_ask_for_ends_the_search(options, message):
    engine = make()
    with pytest.raises(ValueError, match=message):
        search(engine, **options)
    assert_all_returned(engine)


def later(count, error):
    """A callback's body that raises at its `count`-th call."""
    calls = []

    def check():
        calls.append(1)
        if len(calls) == count:
            raise error

    return check


@pytest.mark.parametrize("error", [ZeroDivisionError, Interrupt, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["expand", "evaluate", "select"])
def test_an_error_in_a_callback_gives_everything_back(where, error):
    engine = make()
    check = later(3, error)

    class Expand(NextTokens):
        def candidates(self, node):
            check()
            assert engine.stats.held > 0
            return super().candidates(node)

    callbacks = {
        "expand": Expand(2),
        "evaluate": lambda nodes: check() or [0.0] * len(nodes),
        "select": lambda tree: check() or BestFirst()(tree),
    }
    with pytest.raises(error):
        search(engine, **{where: callbacks[where]})
    assert_all_returned(engine)
    assert search(engine).num_nodes == 11


def test_an_interrupt_at_any_moment_leaves_nothing_running_or_held():
    engine = make()
    search(engine)
    found, number = set(), 1
    while function := interrupted_at(number, lambda: search(engine)):
        found.add(function)
        stats = engine.stats  # takes a turn
        assert (stats.running, stats.waiting, stats.held) == (0, 0, 0), function
        number += number // 10 + 7
    assert len(found) > 20
    assert_all_returned(engine)


def test_an_error_of_the_engine_leaves_the_tree_so_far(monkeypatch):
    engine = make()
    decode = engine._core.device.decode
    whole = search(engine)
    most = engine.stats.forks + 6

    def fail_later(*args):
        if engine.stats.forks > most:
            raise RuntimeError("no more")
        return decode(*args)

    monkeypatch.setattr(engine._core.device, "decode", fail_later)
    with pytest.raises(SearchFailed, match=r"broken off with 7 nodes.*no more") as failed:
        search(engine)
    tree = failed.value.tree
    assert tree.parents.tolist() == whole.parents[:7].tolist()
    assert tree.visits[0] == 6
    assert_all_returned(engine)


def test_a_pool_that_others_pin_meanwhile_leaves_the_tree_so_far():
    engine = make(num_chunks=10)
    pins = []

    def pin(nodes):
        if nodes[0].depth == 2:
            pins.append(engine.pin([7] * 128))
        return [0.0] * len(nodes)

    with pytest.raises(SearchFailed, match="can never have more than 2") as failed:
        search(engine, evaluate=pin, max_tokens=40)
    assert isinstance(failed.value.__cause__, PoolExhausted)
    assert failed.value.tree.num_nodes == 5
    assert len(pins) == 1
    pins[0].release()
    assert_all_returned(engine)


def test_an_engine_that_is_closed_meanwhile_leaves_the_tree_so_far():
    engine = make()

    def close(nodes):
        if nodes[0].depth == 2:
            engine.close()
        return [0.0] * len(nodes)

    with pytest.raises(SearchFailed, match="closed") as failed:
        search(engine, evaluate=close)
    assert failed.value.tree.num_nodes == 5
    assert_all_returned(engine)
    with pytest.raises(EngineClosed):
        search(engine)
