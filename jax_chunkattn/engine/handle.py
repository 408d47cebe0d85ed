"""What a caller holds of a request."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from jax_chunkattn.engine.requests import Completion, Pinned, Request, StreamEvent, TokenLogprobs
from jax_chunkattn.sampling import SamplingParams

if TYPE_CHECKING:
    from jax_chunkattn.engine.engine import Engine


def begun(generator: Generator[Any]) -> Generator[Any]:
    """The generator, advanced to its first `yield`: only from there on does closing it, or dropping
    it, run its `finally`."""
    next(generator)
    return generator


class RequestHandle:
    """One submitted request: read it, stream it, fork it, or abort it.

    The engine only advances while someone asks for something: `stream`, `result`, `Engine.step`.
    All requests advance together then, this one or not.
    """

    def __init__(self, engine: Engine, request: Request):
        self._engine = engine
        self._request = request

    def __repr__(self) -> str:
        return (
            f"<RequestHandle {self.state}: {len(self.prompt)} prompt tokens, "
            f"{len(self._request.tokens)} of at most {self.params.max_tokens} chosen>"
        )

    @property
    def prompt(self) -> tuple[int, ...]:
        return self._request.prompt

    @property
    def params(self) -> SamplingParams:
        return self._request.params

    @property
    def tokens(self) -> tuple[int, ...]:
        """Chosen so far; a fork's begin with those of its parent."""
        return tuple(self._request.tokens)

    @property
    def text(self) -> str:
        """Final text so far; empty without a tokenizer."""
        return self._request.text

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...]:
        return tuple(self._request.logprobs)

    @property
    def state(self) -> str:
        """ "waiting", "prefill", "decode" or "done"."""
        return self._request.phase.value

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def finish_reason(self) -> str | None:
        """None while it runs; then "stop", "length", "abort" or "error"."""
        return self._request.finish_reason

    @property
    def error(self) -> BaseException | None:
        """What ended it, when `finish_reason` is "error"."""
        return self._request.error

    def stream(self) -> Iterator[StreamEvent]:
        """Events as they come, those not read yet first; the last one has a `finish_reason`.

        Leaving the iteration early, by `break`, an exception or closing or dropping the iterator,
        aborts the request, be it before the first event.

        Raises:
          RequestFailed: when an error ended the request, or the engine was closed.
        """
        return begun(self._events())

    def _events(self) -> Generator[Any]:
        finished = False
        try:
            yield None  # to `begun`
            while not finished:
                event = self._engine._next_event(self._request)
                finished = event is None or event.finish_reason is not None
                if event is not None:
                    yield event
        finally:
            if not finished:
                self.abort()

    def result(self) -> Completion:
        """The whole answer, when it is there.

        Raises:
          RequestFailed: when an error ended the request, or the engine was closed.
        """
        return self._engine._wait(self._request)

    def abort(self) -> None:
        """Ends the request at once, wherever it stands. Harmless when it has ended already."""
        self._engine._abort(self._request)

    def fork(
        self,
        params: SamplingParams | None = None,
        *,
        next_token: int | None = None,
        hold: bool = False,
    ) -> RequestHandle:
        """A second request that goes on from here; what is sealed is shared, the tail is copied.

        It begins with this request's tokens, and `max_tokens` counts them. Works at any point of a
        request's life; after its end it is cheap if `submit` was told to `hold`, or else what has
        left the cache is computed again.

        Args:
          params: of the fork; None takes this request's, with a seed of its own, made of
            this request's and of how many forks it has had.
          next_token: put in the place of the last chosen token: another branch of a search.
          hold: as for `Engine.submit`.

        Raises:
          InvalidRequest: when no token could follow, `next_token` has nothing to replace, or the
            parameters ask for more than one answer.
          PoolExhausted: when the pool can never hold it.
        """
        return self._engine._fork(self._request, params, next_token, hold)

    def release(self) -> None:
        """Gives up what `hold` keeps; the tokens stay readable. Harmless at any time."""
        self._engine._let_go(self._request)


class PinnedPrefix:
    """A prefix kept in the pool; see `Engine.pin`."""

    def __init__(self, engine: Engine, pinned: Pinned):
        self._engine = engine
        self._pinned = pinned

    @property
    def num_tokens(self) -> int:
        """Tokens pinned: those of whole chunks."""
        return len(self._pinned.prompt)

    @property
    def computed(self) -> bool:
        """Whether all of it is in the pool."""
        return self._engine._is_computed(self._pinned)

    def release(self) -> None:
        """Lets it be evicted like any other cached prefix. Harmless when it was released before."""
        self._engine._unpin(self._pinned)
