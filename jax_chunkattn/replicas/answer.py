"""A request at the front end: what is kept of it, and what its caller holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from jax_chunkattn.engine.outputs import Completion, StreamEvent
from jax_chunkattn.replicas.router import Routed
from jax_chunkattn.replicas.server import Order
from jax_chunkattn.sampling import SamplingParams, TokenLogprobs


@dataclass(eq=False)
class Kept:
    """What is kept of a request until it has ended: all that another replica needs."""

    key: int
    prompt: tuple[int, ...]
    params: SamplingParams
    salt: str
    session: str | None
    events: deque[StreamEvent] = field(default_factory=deque)
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    routed: Routed | None = None
    finish_reason: str | None = None
    error: Exception | None = None
    moves: int = 0

    @property
    def ended(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def order(self) -> Order:
        return Order(self.key, self.prompt, self.params, self.salt, tuple(self.tokens))


class Keeper(Protocol):
    """Who serves requests that are kept: the front end."""

    def next_event(self, kept: Kept) -> StreamEvent | None: ...

    def wait(self, kept: Kept) -> Kept: ...

    def abort(self, kept: Kept) -> None: ...


class Answer:
    """What a caller holds of a request."""

    def __init__(self, keeper: Keeper, kept: Kept):
        self._keeper = keeper
        self._kept = kept

    @property
    def moves(self) -> int:
        """How often its replica was lost and it went on at another."""
        return self._kept.moves

    @property
    def tokens(self) -> tuple[int, ...]:
        """Chosen so far."""
        return tuple(self._kept.tokens)

    def stream(self) -> Iterator[StreamEvent]:
        """Events that have not been read yet, as they come; the last one has a `finish_reason`.

        Raises what `result` raises.
        """
        while (event := self._keeper.next_event(self._kept)) is not None:
            yield event

    def result(self) -> Completion:
        """The whole answer, when it is there.

        Raises:
          InvalidRequest, PoolExhausted: the replica could never serve it.
          RequestFailed: an error ended it, or there is no replica left.
          EngineClosed: the front end was closed.
        """
        kept = self._keeper.wait(self._kept)
        assert kept.finish_reason is not None
        assert kept.params.seed is not None
        return Completion(
            tuple(kept.tokens), "".join(kept.text), tuple(kept.logprobs), kept.finish_reason,
            kept.params.seed,
        )  # fmt: skip

    def abort(self) -> None:
        """Ends the request. Harmless when it has ended already."""
        self._keeper.abort(self._kept)
