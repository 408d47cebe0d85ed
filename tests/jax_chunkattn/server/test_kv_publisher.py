"""KV events that are published are those of the engine, in vLLM's frames."""

from __future__ import annotations

import time

import pytest

from jax_chunkattn import KVEvents, SamplingParams
from jax_chunkattn.replicas.wire import decode_batch
from jax_chunkattn.server.kv_publisher import KVPublisher
from jax_chunkattn.tree.kv_events import AllBlocksCleared, BlockStored
from tests.jax_chunkattn.engine.engines import make_engine

zmq = pytest.importorskip("zmq", reason="needs pyzmq, of the extra server")
msgspec = pytest.importorskip("msgspec", reason="needs msgspec, of the extra server")


def test_subscribers_follow_the_cache():
    events = KVEvents()
    engine = make_engine(kv_events=events)
    publisher = KVPublisher(events, "tcp://127.0.0.1:0", "kv@tiny")
    context = zmq.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
    subscriber.setsockopt(zmq.RCVTIMEO, 30_000)
    subscriber.connect(publisher.address)
    time.sleep(0.3)  # until the subscription is there
    try:
        prompt = [at % 90 for at in range(40)]
        engine.submit(prompt, SamplingParams(1), salt="s").result()
        topic, number, batch = subscriber.recv_multipart()
        assert (topic, int.from_bytes(number, "big")) == (b"kv@tiny", 0)
        told, [stored], rank = decode_batch(msgspec.msgpack.decode(batch))
        assert abs(told - time.time()) < 60
        assert rank is None
        assert isinstance(stored, BlockStored)
        assert (list(stored.token_ids), stored.salt) == (prompt[:32], b"s")
        engine.reset()
        _, number, batch = subscriber.recv_multipart()
        assert int.from_bytes(number, "big") == 1
        assert decode_batch(msgspec.msgpack.decode(batch))[1] == [AllBlocksCleared()]
    finally:
        publisher.close()
        subscriber.close()
        context.term()


def test_an_address_that_cannot_be_bound_is_refused():
    events = KVEvents()
    with pytest.raises(OSError, match="rotocol"):
        KVPublisher(events, "nonsense://x")
