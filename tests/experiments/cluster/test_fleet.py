"""A simulated fleet, against what can be said of it in a line."""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np
import pytest

from experiments.cluster.config import ClusterConfig
from experiments.cluster.device_model import DeviceModel, fit_device, model_of
from experiments.cluster.replica import CALL_TOKENS, STEPS
from experiments.cluster.simulation import Replayed, replay
from experiments.cluster.workload import Arrival, Workload, make_workload
from experiments.harness.errors import UserError
from jax_chunkattn import Router
from jax_chunkattn.replicas.policies import LeastLoaded, LongestMatch

CHUNK = 8
DEVICE = DeviceModel(1e-3, 1e-5, 1e-9, 2e-3, 1e-4, 1e-7, 1e-8)


def run(arrivals, *, replicas=1, num_chunks=10_000, max_running=4, policy=None) -> Replayed:
    router = Router(policy or LongestMatch(), chunk_size=CHUNK)
    workload = Workload("some", tuple(arrivals))
    sizes = {"replicas": replicas, "num_chunks": num_chunks, "max_running": max_running}
    replayed = replay(workload, router, DEVICE, **sizes)
    assert set(router.loads.values()) == {0.0}
    return replayed


def alone(prompt: int, answer: int, due: float = 0.0, begin: int = 0) -> Arrival:
    """A request whose prompt and answer nobody else has."""
    return Arrival(due, prompt, answer, ((begin, prompt + answer),))


def random_arrivals(seed: int, count: int, gap: float) -> list[Arrival]:
    """Prompts that go on from others' prompts and answers."""
    choose, arrivals, used = random.Random(seed), [], 1
    for number in range(count):
        parts: tuple[tuple[int, int], ...] = ()
        if arrivals and choose.random() < 0.8:
            before = choose.choice(arrivals)
            parts = (*before.parts[:-1], (before.parts[-1][0], choose.randint(1, 40)))
        prompt, answer = choose.randint(1, 60), choose.randint(1, 40)
        parts = (*parts, (used, prompt + answer))
        used += 100
        total = sum(length for _, length in parts)
        arrivals.append(Arrival(number * gap, total - answer, answer, parts))
    return arrivals


def test_a_request_alone_takes_what_the_device_takes():
    prompt, answer = 2 * CALL_TOKENS + 30, 20
    replayed = run([alone(prompt, answer)])
    [served] = replayed.served
    prefill = DEVICE.prefill(0, prompt, 3)
    assert served.first_token == pytest.approx(prefill)
    calls = -(-(answer - 1) // STEPS)
    decode = DEVICE.decode(1, -(-prompt // CHUNK) * CHUNK, prompt + 1, calls * STEPS)
    assert served.finished == pytest.approx(prefill + decode)
    assert replayed.busy == [pytest.approx(prefill + decode)]


def test_rows_that_decode_pause_for_a_prompt_and_both_go_on_together():
    before = run([alone(100, 400)]).served[0]
    first, second = run([alone(100, 400), alone(100, 400, 0.1, 1000)]).served
    assert first.first_token == before.first_token
    assert 0.1 < second.first_token < 0.1 + 3 * (STEPS * 3e-3)
    assert before.finished < first.finished < second.finished


@pytest.mark.parametrize("seed", range(4))
def test_one_replica_finds_what_its_tree_can_have(seed: int):
    """Requests far apart: each may take over what it has in common with any sealed chunk."""
    arrivals = random_arrivals(seed, 40, gap=100.0)
    replayed = run(arrivals)
    stored: list[np.ndarray] = []
    for arrival, served in zip(arrivals, replayed.served, strict=True):
        tokens = arrival.tokens()
        assert len(tokens) == arrival.prompt + arrival.answer
        expected = max((common(tokens[: arrival.prompt], other) for other in stored), default=0)
        assert served.found == min(expected, arrival.prompt - 1)
        written = len(tokens) - 1
        stored.append(tokens[: written // CHUNK * CHUNK])
    assert replayed.router.found_tokens == sum(served.found or 0 for served in replayed.served)


def common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_chunks", [40, 1000])
def test_everybody_is_served_to_the_end_however_small_the_pools(seed: int, num_chunks: int):
    arrivals = random_arrivals(seed, 120, gap=0.01)
    replayed = run(arrivals, replicas=3, num_chunks=num_chunks, policy=LeastLoaded())
    assert replayed.refused + len(replayed.served) == 120
    assert (replayed.evicted > 0) == (num_chunks == 40)
    for served in replayed.served:
        assert served.chosen == served.arrival.answer
        assert served.arrival.due < served.first_token <= served.finished
    assert replayed.seconds == max(served.finished for served in replayed.served)
    assert max(replayed.busy) <= replayed.seconds


def test_when_rows_outgrow_the_pool_the_youngest_gives_way_and_is_served_later():
    arrivals = [alone(20, 200, 0.01 * one, 1000 * one) for one in range(3)]
    roomy, tight = run(arrivals), run(arrivals, num_chunks=45)
    assert (roomy.preemptions, roomy.evicted) == (0, 0)
    assert tight.preemptions > 0
    ends = [served.finished for served in tight.served]
    assert [served.chosen for served in tight.served] == [200] * 3
    assert ends == sorted(ends)
    assert ends[2] > roomy.served[2].finished


def test_a_request_that_no_pool_can_hold_is_refused():
    replayed = run([alone(100, 5), alone(10, 5, 1.0, 200)], num_chunks=12)
    assert (replayed.refused, len(replayed.served)) == (1, 1)


def test_the_router_finds_prefixes_again_that_chance_does_not():
    arrivals = random_arrivals(5, 300, gap=0.05)
    found = {
        policy.name: sum(one.found or 0 for one in run(arrivals, replicas=8, policy=policy).served)
        for policy in (LongestMatch(), LeastLoaded())
    }
    assert found["longest-match"] > 1.5 * found["least-loaded"]


def test_a_fit_finds_the_model_that_made_the_points():
    choose = random.Random(0)
    prefills = [
        {"tokens": n, "seconds": DEVICE.prefill(0, n, -(-n // CALL_TOKENS))}
        for n in (10, 300, 900, 2000, 5000)
    ]
    decodes = [
        {"rows": rows, "distinct": distinct, "read": read}
        | {"seconds": DEVICE.decode(rows, distinct, read, 1)}
        for rows in (1, 4, 9)
        for distinct, read in [(choose.randint(1, 5000), choose.randint(5000, 9000))] * 2
    ] + [{"rows": 2, "distinct": 7, "read": 70, "seconds": DEVICE.decode(2, 7, 70, 1)}]
    fit = fit_device(prefills, decodes, CALL_TOKENS)
    for name, value in dataclasses.asdict(DEVICE).items():
        assert getattr(model_of(fit), name) == pytest.approx(value, rel=1e-4)
    assert fit["errors"]["decode"]["most"] < 1e-4


def test_steps_at_once_take_as_long_as_one_after_another():
    grown = [DEVICE.decode(3, 100 + 3 * step, 500 + 3 * step, 1) for step in range(16)]
    assert DEVICE.decode(3, 100, 500, 16) == pytest.approx(sum(grown))
    pieces = [DEVICE.prefill(begin, 100, 1) for begin in range(0, 500, 100)]
    assert DEVICE.prefill(0, 500, 5) == pytest.approx(sum(pieces))


def test_a_turn_of_a_made_up_conversation_goes_on_from_the_answer_before():
    workload = make_workload(ClusterConfig(requests=200, tenants=3))
    assert len(workload.arrivals) == 200
    dues = [one.due for one in workload.arrivals]
    assert dues == sorted(dues)
    by_conversation: dict[int, list[Arrival]] = {}
    for one in workload.arrivals:
        by_conversation.setdefault(one.parts[1][0], []).append(one)
    assert max(map(len, by_conversation.values())) > 1
    for turns in by_conversation.values():
        for one, after in itertools.pairwise(turns):
            length = one.prompt + one.answer
            assert after.prompt > length
            assert np.array_equal(one.tokens(), after.tokens()[:length])
    stretched = workload.stretched(30.0)
    assert stretched.arrivals[0].due == 0
    assert stretched.arrivals[-1].due == pytest.approx(30.0)


def test_equal_blocks_of_a_trace_are_equal_tokens(tmp_path):
    lines = [
        '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}',
        '{"timestamp": 9, "input_length": 700, "output_length": 5, "hash_ids": [0, 2]}',
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines))
    first, second = make_workload(ClusterConfig(trace=trace)).arrivals
    assert common(first.tokens(), second.tokens()) == 512
    assert not set(first.tokens()[600:]) & set(second.tokens())
    one, other = make_workload(ClusterConfig(trace=trace, scale=8)).arrivals
    assert (one.prompt, one.answer, other.prompt) == (75, 1, 88)
    assert common(one.tokens(), other.tokens()) == 64
    with pytest.raises(UserError, match="has 2"):
        make_workload(ClusterConfig(trace=trace, requests=3))
    trace.write_text(lines[0].replace("[0, 1]", f"[0, {2**23}]"))
    with pytest.raises(UserError, match="beyond"):
        make_workload(ClusterConfig(trace=trace))
