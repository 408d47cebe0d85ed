"""How much one client, and all together, may ask for at once."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass

from jax_chunkattn.server.errors import ApiError
from jax_chunkattn.server.tenants import Tenant

RATE_OVER = 32  # first tokens that the rate of serving is taken from
LONGEST_WAIT = 60  # seconds that a client is told to wait at most


@dataclass(frozen=True)
class Limits:
    """Attributes:
    body_bytes: of a request.
    body_seconds: in which all of it must have come.
    prompt_tokens: of one prompt; None leaves it to the model and the pool.
    new_tokens: that one answer may ask for; None leaves it to the model and the pool.
    default_new_tokens: that a chat's answer may have if it does not say how many.
    samples: `n`.
    answers: `n` times the prompts of one request.
    score_tokens: of one request to `/v1/score`, or of prompts with `echo` and `logprobs`.
    queue: answers that wait for their first token, of all clients.
    streams: answers of one key that are not finished.
    stalled_seconds: after which a client that reads nothing is given up.

    Raises:
      ValueError: for a limit below 1.
    """

    body_bytes: int = 4 << 20
    body_seconds: float = 30.0
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    default_new_tokens: int = 1024
    samples: int = 64
    answers: int = 128
    score_tokens: int = 65_536
    queue: int = 256
    streams: int = 256
    stalled_seconds: float = 60.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value >= 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


class Gate:
    """Counts answers that wait or run, for the event loop alone."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._running: Counter[str] = Counter()
        self._first_tokens: deque[float] = deque(maxlen=RATE_OVER)
        self.waiting = 0

    @property
    def open(self) -> int:
        """Answers that have come in and are not finished."""
        return self._running.total()

    def enter(self, tenant: Tenant, answers: int) -> None:
        """So many answers are asked for together. Raises ApiError, with when to come again, where
        that is too many now, and changes nothing then."""
        limits = self._limits
        if self.waiting + answers > limits.queue:
            raise self._too_many(
                f"{self.waiting} answers wait already; the queue holds {limits.queue}", "queue_full"
            )
        if self._running[tenant.name] + answers > limits.streams:
            raise self._too_many(
                f"this key has {self._running[tenant.name]} answers under way; "
                f"{limits.streams} at once are served",
                "rate_limit_exceeded",
            )
        self.waiting += answers
        self._running[tenant.name] += answers

    def withdraw(self, tenant: Tenant, answers: int) -> None:
        """So many that have come in are not asked for after all."""
        self.waiting -= answers
        self._leave(tenant, answers)

    def began(self) -> None:
        """An answer has its first token, or has ended without any."""
        self.waiting -= 1
        self._first_tokens.append(time.monotonic())

    def leave(self, tenant: Tenant) -> None:
        """An answer has ended."""
        self._leave(tenant, 1)

    def _leave(self, tenant: Tenant, answers: int) -> None:
        self._running[tenant.name] -= answers
        if not self._running[tenant.name]:
            del self._running[tenant.name]

    def _too_many(self, message: str, code: str) -> ApiError:
        seconds = min(LONGEST_WAIT, max(1, math.ceil(self._seconds_to_clear())))
        return ApiError(
            429,
            f"{message}: try again in {seconds} s",
            code=code,
            headers={"Retry-After": str(seconds)},
        )

    def _seconds_to_clear(self) -> float:
        """Until half of those who wait have begun, at the rate of the last few."""
        if len(self._first_tokens) < 2:
            return 1.0
        seconds = time.monotonic() - self._first_tokens[0]
        return self.waiting / 2 * seconds / len(self._first_tokens)
