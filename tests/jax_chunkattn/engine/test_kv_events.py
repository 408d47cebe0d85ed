"""What an engine tells a router about its cache: all that a prompt would find, and nothing else."""

from __future__ import annotations

import pytest

from jax_chunkattn import KVEvents, Router, SamplingParams
from jax_chunkattn.device import device
from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockStored
from tests.jax_chunkattn.engine.engines import make_engine, run
from tests.jax_chunkattn.toy import greedy_without_cache, token_tree

PROMPTS = token_tree((1, 40), (4, 9))
TOKENS = 30


class Follower:
    """A router with one replica, that of an engine."""

    def __init__(self, **options):
        self.cache = KVEvents()
        self.engine = make_engine(kv_events=self.cache, **options)
        self.router = Router(chunk_size=16)
        self.router.add("it")

    def serve(self, prompts=PROMPTS, salt=""):
        params = SamplingParams(TOKENS)
        answers = run([self.engine.submit(prompt, params, salt=salt) for prompt in prompts])
        self.router.apply("it", self.cache.take())
        return answers

    def expects(self, prompt, salt=""):
        """What the router says is there; nothing stays on its way."""
        routed = self.router.route(prompt, salt=salt.encode())
        self.router.finish(routed)
        return routed.found_tokens

    def finds(self, prompt, salt=""):
        """What the engine says it found, of whole chunks."""
        before = self.engine.stats.prompts
        run([self.engine.submit(prompt, SamplingParams(1), salt=salt)])
        after = self.engine.stats.prompts
        return 16 * -((before.hit - after.hit) // 16)  # a prompt's last token is always computed


def test_the_router_expects_what_the_engine_finds_answers_included():
    follower = Follower()
    answers = follower.serve()
    history = [*PROMPTS[0], *answers[0], 5, 6, 7]
    expected = follower.expects(history)
    assert expected == 16 * ((len(PROMPTS[0]) + TOKENS - 1) // 16)
    assert follower.finds(history) == expected
    assert follower.expects(PROMPTS[1], "tenant") == follower.finds(PROMPTS[1], "tenant") == 0
    follower.serve(PROMPTS[:1], "tenant")
    assert follower.expects(PROMPTS[0], "tenant") == 16 * (len(PROMPTS[0]) // 16)


def test_what_was_evicted_is_not_expected():
    follower = Follower(num_chunks=10)
    follower.serve()
    follower.serve([[9] * 120])
    stats = follower.engine.stats
    assert stats.evictions
    assert follower.router.stats.removed == stats.evictions
    assert len(follower.cache) == stats.chunks_cached == follower.router.stats.map_chunks
    for prompt in (*PROMPTS, [9] * 120):
        assert follower.expects(prompt) == follower.finds(prompt)
        follower.router.apply("it", follower.cache.take())


@pytest.mark.parametrize("how", ["reset", "new weights", "an error"])
def test_a_cache_that_is_emptied_says_so(how, monkeypatch):
    follower = Follower()
    follower.serve()
    assert follower.expects(PROMPTS[0])
    if how == "reset":
        follower.engine.reset()
    elif how == "new weights":
        follower.engine.update_weights(follower.engine.weights)
    else:
        broken = iter([True])
        decode = device.Device.decode

        def once(*args, **kwargs):
            if next(broken, False):
                raise RuntimeError("once")
            return decode(*args, **kwargs)

        monkeypatch.setattr(device.Device, "decode", once)
        follower.engine.submit([3] * 20, SamplingParams(4)).result()
    events = follower.cache.take()
    assert AllBlocksCleared() in events
    follower.router.apply("it", events)
    assert follower.expects(PROMPTS[0]) == 0
    assert len(follower.cache) == follower.router.stats.map_chunks
    answers = follower.serve()
    assert answers == [greedy_without_cache(prompt, TOKENS) for prompt in PROMPTS]
    assert follower.expects(PROMPTS[0]) == follower.finds(PROMPTS[0])


def test_events_are_of_chunks_that_were_computed():
    follower = Follower()
    handle = follower.engine.submit(PROMPTS[0], SamplingParams(TOKENS))
    assert follower.cache.take() == []
    handle.abort()
    follower.engine.run()
    assert follower.cache.take() == []
    follower.engine.submit(PROMPTS[0], SamplingParams(1)).result()
    [event] = follower.cache.take()
    assert isinstance(event, BlockStored)
    assert list(event.token_ids) == list(PROMPTS[0][: 16 * (len(PROMPTS[0]) // 16)])
