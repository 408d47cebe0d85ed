"""KV events over ZeroMQ, as vLLM publishes them: for routers that follow its caches.

Three frames: a topic, the batch's number as 8 bytes (big endian), and the batch in MessagePack
(`jax_chunkattn.replicas.wire`). Events have the tokens of what is cached, of all tenants: whoever
can subscribe can read prompts. Needs pyzmq and msgspec.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from jax_chunkattn.replicas.wire import encode_batch
from jax_chunkattn.tree.kv_events import KVEvents

EVERY = 0.05  # seconds between two looks
MOST_UNSENT = 100_000  # batches that one slow subscriber may be behind; it misses later ones

_LOG = logging.getLogger("jax_chunkattn.server")


class KVPublisher:
    """Publishes what an engine's cache gains and loses, until it is closed.

    Args:
      events: that the engine was made with.
      address: to bind, such as tcp://127.0.0.1:5557; with port 0 one that is free is taken.
      topic: of the first frame.

    Attributes:
      address: where subscribers find it.

    Raises:
      OSError: when it cannot be bound (ZeroMQ's error is one).
    """

    def __init__(self, events: KVEvents, address: str, topic: str = ""):
        import msgspec
        import zmq

        self._events = events
        self._topic = topic.encode()
        self._encode = msgspec.msgpack.encode
        self._context: Any = zmq.Context()
        self._socket: Any = self._context.socket(zmq.PUB)
        self._socket.set_hwm(MOST_UNSENT)
        self._socket.linger = 0
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close()
            self._context.term()
            raise OSError(error.errno, str(error)) from error
        self.address = self._socket.last_endpoint.decode()
        self._number = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Publishes what has happened until now, and ends."""
        self._closing.set()
        self._thread.join()

    def _run(self) -> None:
        """ZeroMQ's sockets are for one thread."""
        try:
            while not self._closing.wait(EVERY):
                self._publish()
            self._publish()
        except Exception:
            _LOG.exception("KV events are not published any longer")
        finally:
            self._socket.close()
            self._context.term()

    def _publish(self) -> None:
        events = self._events.take()
        if events:
            batch = self._encode(encode_batch(events, time.time()))
            self._socket.send_multipart([self._topic, self._number.to_bytes(8, "big"), batch])
            self._number += 1
