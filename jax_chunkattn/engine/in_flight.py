"""Calls that were dispatched to the device, and whose results have not been taken over."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jax_chunkattn.device.device import Call
from jax_chunkattn.engine.requests import Request, Scored

MAX_ROUNDS = 2


@dataclass(frozen=True)
class ScoredPart:
    """What a call scores for one work.

    Attributes:
      position: in its text, where the first token stands that is scored from.
      places: among all scores of the call.
    """

    work: Scored
    position: int
    places: range


@dataclass(frozen=True, eq=False)
class SentCall:
    """A call, whose tokens it chooses, and what it scores.

    Attributes:
      requests, rows: in which of the call's rows each request's tokens are.
      most_tokens: that each of them can get.
      round: in which it was sent.
    """

    call: Call
    requests: Sequence[Request]
    rows: Sequence[int]
    most_tokens: Sequence[int]
    scored: Sequence[ScoredPart]
    round: int


class CallsInFlight:
    """The calls of at most two rounds, the oldest first.

    While the device computes one round, the host takes over the results of the round before, and
    plans and dispatches the next. Calls run in the order of their dispatch. That is what makes it
    safe to free a chunk while a call that reads or writes it is still on its way: whoever gets it
    next writes to it in a later call.
    """

    def __init__(self) -> None:
        self._calls: deque[SentCall] = deque()
        self._round = 0

    def __len__(self) -> int:
        return len(self._calls)

    def begin_round(self) -> bool:
        """Whether another round may be dispatched; calls belong to it from now on."""
        if len({sent.round for sent in self._calls}) >= MAX_ROUNDS:
            return False
        self._round += 1
        return True

    def add(
        self,
        call: Call,
        requests: Sequence[Request],
        rows: Sequence[int],
        most_tokens: Sequence[int],
        scored: Sequence[ScoredPart] = (),
    ) -> None:
        """A call of this round, in which row `rows[i]` is `requests[i]`'s."""
        for request, most in zip(requests, most_tokens, strict=True):
            request.in_flight += most
            if call.decoded:
                request.writes_in_flight += most
                request.written = request.placed.num_tokens + request.writes_in_flight
        self._calls.append(SentCall(call, requests, rows, most_tokens, scored, self._round))

    def take_oldest(self) -> SentCall:
        """The call that is over first; what it could do is not in flight any longer."""
        sent = self._calls.popleft()
        for request, most in zip(sent.requests, sent.most_tokens, strict=True):
            request.in_flight -= most
            request.writes_in_flight -= most * sent.call.decoded
        return sent

    def clear(self) -> None:
        """Gives up their results; the scheduler's `restart` forgets what they could do."""
        self._calls.clear()
