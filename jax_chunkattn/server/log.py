"""What a server tells of itself: a line of JSON for each request, never what was asked.

A thread of its own writes, so that nobody waits for who reads.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from typing import Any, TextIO

MOST_QUEUED = 10_000  # lines; those that come when so many wait are lost, and counted


class JsonLines(logging.Formatter):
    """A record as one line: its time, level and logger, and the fields it was given."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)


class Log:
    """Writes what is logged to a stream until it is closed.

    Args:
      name: of the logger that it listens to.
      stream: where lines go; None is standard error.
    """

    def __init__(self, name: str = "jax_chunkattn.server", stream: TextIO | None = None):
        self.lost = 0
        self._logger = logging.getLogger(name)
        writer = logging.StreamHandler(stream or sys.stderr)
        writer.setFormatter(JsonLines())
        lines: queue.Queue[Any] = queue.Queue(MOST_QUEUED)
        self._handler = _Queued(lines, self)
        self._listener = _Listener(lines, writer)
        self._before = self._logger.level, self._logger.propagate
        self._logger.setLevel(logging.INFO)
        self._logger.propagate = False
        self._logger.addHandler(self._handler)
        self._listener.start()

    def close(self) -> None:
        """Writes what waits, and listens no longer."""
        self._logger.removeHandler(self._handler)
        self._logger.level, self._logger.propagate = self._before
        self._listener.stop()


class _Queued(logging.handlers.QueueHandler):
    """Puts records into the queue as they are; `Log` counts those that find it full."""

    def __init__(self, lines: queue.Queue[Any], log: Log):
        super().__init__(lines)
        self._log = log

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self._log.lost += 1


class _Listener(logging.handlers.QueueListener):
    """Ends when all that waits is written, also where the queue is full."""

    def __init__(self, lines: queue.Queue[Any], writer: logging.Handler):
        super().__init__(lines, writer)
        self._lines = lines

    def enqueue_sentinel(self) -> None:
        self._lines.put(None)
