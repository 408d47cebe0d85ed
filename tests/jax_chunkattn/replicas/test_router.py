"""Where requests go: what replicas hold, how much they have to do, sessions, replicas that go."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy as np
import pytest

from jax_chunkattn import KVEvents, NoReplica, OverloadRule, PrefixTree, Router
from jax_chunkattn.replicas.policies import (
    POLICIES,
    LeastLoaded,
    LeastWork,
    LongestMatch,
    PrefixHash,
    Random,
)
from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockStored

CHUNK = 4
NAMES = ["a", "b", "c"]
RULE = OverloadRule(factor=1.0, slack=30, row_tokens=2)


def make_router(policy=None, names=NAMES, **options) -> Router:
    options = {"chunk_size": CHUNK, "overload": RULE, **options}
    router = Router(policy or LongestMatch(), **options)
    for name in names:
        router.add(name)
    return router


def family(number: int, own: int = 0, shared: int = 16) -> list[int]:
    """A prompt of one of several families, with a few tokens of its own."""
    return [number] * shared + [100 + own] * 4


def test_requests_follow_their_prefix_while_it_is_on_its_way_and_when_it_is_there():
    router = make_router()
    first = router.route(family(1))
    assert (first.found_tokens, router.stats.unmatched) == (0, 1)
    assert {router.route(family(1, own)).replica for own in (1, 2, 3)} == {first.replica}
    assert router.stats.matched == 3
    assert router.stats.predicted_tokens == 16 * 3
    cache = KVEvents()
    tree = PrefixTree(40, CHUNK, observers=[cache])
    sequence = tree.insert(family(2))
    tree.mark_computed(sequence, 20)
    other = next(name for name in NAMES if name != first.replica)
    router.apply(other, cache.take())
    assert router.route(family(2)).replica == other
    tree.release(sequence)
    tree.evict(3)
    router.apply(other, cache.take())
    assert router.route([2] * 16).found_tokens == 20 - 4  # still expected: on its way there
    assert (router.stats.stored, router.stats.removed) == (5, 3)


def test_what_ended_without_being_stored_is_not_counted_on():
    router = make_router()
    gone = router.route(family(1))
    router.finish(gone)
    router.finish(gone)
    assert router.route(family(1)).found_tokens == 0
    guessing = make_router(events=False)
    guessing.finish(guessing.route(family(1)))
    assert guessing.route(family(1)).found_tokens == 20


def test_an_overloaded_replica_is_passed_over_and_that_is_counted():
    router = make_router()
    home = router.route(family(1)).replica
    went = [router.route(family(1, own)).replica for own in range(20)]
    assert set(went) > {home}
    stats = router.stats
    assert stats.overloaded >= 1
    assert stats.requests == stats.matched + stats.overloaded + stats.unmatched == 21
    assert stats.by_replica == Counter([home, *went])
    mean = sum(router.loads.values()) / 3
    assert max(router.loads.values()) <= mean + RULE.slack + 20 + RULE.row_tokens


def test_work_is_what_waits_to_be_computed_and_what_runs():
    router = make_router(LeastLoaded(), ["a"])
    first, second = router.route(family(1)), router.route(family(1, 1))
    assert router.loads == {"a": (20 + 2) + (4 + 2)}
    router.began(first, found_tokens=0)
    router.began(first)
    assert router.loads == {"a": 2 + (4 + 2)}
    router.finish(first)
    router.finish(second)
    assert router.loads == {"a": 0}
    assert (router.stats.found_tokens, router.stats.judged_tokens) == (0, 20)


def test_what_all_prompts_begin_with_does_not_gather_them():
    prompts = [[7] * 8 + [100 + own] * 92 for own in range(12)]
    greedy, modest = make_router(LongestMatch(0)), make_router(LongestMatch(0.1))
    for prompt in prompts:
        for router in (greedy, modest):
            routed = router.route(prompt)
            router.began(routed)
            router.finish(routed)
            router.apply(routed.replica, stored(prompt))
    assert len(greedy.stats.by_replica) == 1
    assert len(modest.stats.by_replica) == 3
    assert modest.stats.passed_by > 0


def stored(prompt: list[int]) -> list:
    cache = KVEvents()
    tree = PrefixTree(100, CHUNK, observers=[cache])
    tree.mark_computed(tree.insert(prompt), len(prompt))
    return cache.take()


def test_least_work_weighs_what_is_there_against_what_waits():
    router = make_router(LeastWork(), ["a", "b"])
    home = router.route(family(1)).replica
    assert router.route(family(1, 1)).replica != home  # 16 found, 22 waiting
    router.finish(busy := router.route(family(3)))
    assert busy.found_tokens == 0


def test_a_session_stays_where_it_is_until_its_replica_is_lost_or_overloaded():
    router = make_router(Random())
    homes = {name: router.route([number], session=name) for number, name in enumerate("xyz")}
    for _ in range(3):
        for name, home in homes.items():
            assert router.route([9], session=name).replica == home.replica
    assert router.stats.sticky == 9
    lost = homes["x"].replica
    router.lose(lost)
    assert router.route([9], session="x").replica != lost
    few = make_router(Random(), max_sessions=1)
    few.route([1], session="x")
    few.route([1], session="y")
    few.route([1], session="x")
    assert few.stats.sticky == 0
    busy = make_router(Random(), overload=OverloadRule(1.0, 0, 1), seed=1)
    went = {busy.route([1] * 50, session="x").replica for _ in range(3)}
    assert len(went) > 1


def test_requests_of_a_lost_replica_come_back_to_be_routed_again():
    router = make_router()
    there = [router.route(family(number)) for number in range(6)]
    lost = there[0].replica
    back = router.lose(lost)
    assert back == [one for one in there if one.replica == lost]
    again = router.route(family(0))
    assert again.replica != lost
    assert again.found_tokens == 0
    router.finish(back[0])  # somebody who does not know yet
    assert (router.stats.lost, router.stats.rerouted) == (1, len(back))
    router.add("d")
    assert router.loads["d"] == 0
    assert set(router.replicas) == {*NAMES, "d"} - {lost}
    for name in router.replicas:
        router.lose(name)
    with pytest.raises(NoReplica):
        router.route([1])


def test_a_prefix_has_the_same_replica_in_every_router_and_few_move_when_one_comes():
    names = [f"replica-{number}" for number in range(10)]
    prompts = [[number] * 8 + [5] for number in range(400)]
    roomy = OverloadRule(slack=1e9)

    def homes(names):
        router = make_router(PrefixHash(8), names, overload=roomy)
        return [router.route(prompt).replica for prompt in prompts]

    before, reversed_order = homes(names), homes(names[::-1])
    assert before == reversed_order
    assert min(Counter(before).values()) > 400 / 10 / 2
    after = homes([*names, "another"])
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"another"}
    assert len(moved) < 2 * 400 / 11
    short = make_router(PrefixHash(8))
    assert short.route([1]).replica in NAMES


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_within_the_replicas_there_are(name):
    router, choose = make_router(POLICIES[name](), seed=3), random.Random(0)
    alive = list(NAMES)
    for step in range(300):
        if step % 50 == 49:
            router.lose(alive.pop(0))
            alive.append(f"new {step}")
            router.add(alive[-1])
        routed = router.route(family(choose.randrange(5), choose.randrange(4)))
        assert routed.replica in alive
        if choose.random() < 0.8:
            router.finish(routed)
    assert sum(router.stats.by_replica.values()) == router.stats.requests == 300


def test_many_threads_leave_it_as_one_does():
    router = make_router()

    def work(seed):
        choose = random.Random(seed)
        for _ in range(200):
            routed = router.route(family(choose.randrange(5)), session=str(choose.randrange(9)))
            router.began(routed)
            router.finish(routed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert router.stats.requests == 800
    assert set(router.loads.values()) == {0.0}


def test_what_cannot_be_is_refused():
    router = make_router()
    with pytest.raises(ValueError, match="already"):
        router.add("a")
    with pytest.raises(ValueError, match="no replica 'z'"):
        router.lose("z")
    with pytest.raises(ValueError, match="no replica 'z'"):
        router.apply("z", [AllBlocksCleared()])
    with pytest.raises(ValueError, match="chunks of 2 tokens"):
        router.apply("a", [BlockStored((1,), None, (1, 2), 2)])
    with pytest.raises(ValueError, match="empty"):
        router.route([])
    with pytest.raises(ValueError, match="chunk_size"):
        Router(chunk_size=0)
    with pytest.raises(ValueError, match="factor"):
        OverloadRule(factor=0.5)
    with pytest.raises(ValueError, match="tokens"):
        PrefixHash(0)
    with pytest.raises(ValueError, match="least_share"):
        LongestMatch(2)


def test_a_thousand_replicas_are_told_apart():
    router = make_router(names=[str(number) for number in range(1000)])
    prompt = np.arange(16)
    router.apply("777", stored(prompt.tolist()))
    assert router.route(prompt).replica == "777"
    router.apply("777", [AllBlocksCleared()])
    assert router.stats.cleared == 1
