"""What a caller holds of a request."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TypeVar

from jax_chunkattn.engine.misses import PromptUse
from jax_chunkattn.engine.outputs import Completion, Output, StreamEvent
from jax_chunkattn.engine.requests import Pinned, Request
from jax_chunkattn.engine.service import Service
from jax_chunkattn.sampling import SamplingParams, TokenLogprobs

Item = TypeVar("Item")


class Reading(Iterator[Item]):
    """An iteration over what requests come to; left early, it aborts them.

    No generator: its `finally` would run wherever the interpreter finds that nobody refers to it
    any more, in the midst of the engine's work too, and could not tell that from being closed.
    """

    def __init__(self, service: Service, requests: Iterable[Request]):
        self._service = service
        self._requests = tuple(requests)
        self._reader = service.turns.reader(self, self._requests)

    def __iter__(self) -> Reading[Item]:
        return self

    def __next__(self) -> Item:
        if self._reader.over or self._reader.left:
            raise StopIteration
        self._service.turns.refuse_handlers()
        try:
            item = self._read()
        except BaseException:
            self._service.turns.drop(self._reader)
            raise
        if item is None:
            self._reader.end()
            raise StopIteration
        return item

    def close(self) -> None:
        """Ends the iteration, and aborts the requests at once. Harmless at any time."""
        if not self._reader.over:
            for request in self._requests:
                self._service.abort(request)
            self._reader.end()

    @abstractmethod
    def _read(self) -> Item | None:
        """The next item; None when there is no other."""


class Stream(Reading[StreamEvent]):
    """One request's events; see `RequestHandle.stream`."""

    def _read(self) -> StreamEvent | None:
        event = self._service.next_event(self._requests[0])
        if event is not None and event.finish_reason is not None:
            self._reader.end()
        return event


class Outputs(Reading[Output]):
    """The answers to prompts; see `Engine.generate`."""

    def __init__(
        self, service: Service, samples: list[list[Request]], *, in_order: bool, enough: int | None
    ):
        super().__init__(service, (request for each in samples for request in each))
        self._groups = dict(enumerate(samples))
        self._in_order = in_order
        self._enough = enough

    def _read(self) -> Output | None:
        how = {"in_order": self._in_order, "enough": self._enough}
        taken = self._service.take_group(self._groups, **how)
        if taken is None:
            return None
        index, group, answers = taken
        return Output(index, group[0].prompt, answers)


class RequestHandle:
    """One submitted request: read it, stream it, fork it, or abort it.

    The engine only advances while someone asks for something: `stream`, `result`, `Engine.step`.
    All requests advance together then, this one or not.
    """

    def __init__(self, service: Service, request: Request):
        self._service = service
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
    def prefix(self) -> str | None:
        """The name of the learned prefix that the prompt comes behind, if it does."""
        virtual = self._request.virtual
        return None if virtual is None else virtual.name

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
    def prompt_use(self) -> PromptUse | None:
        """Where its prompt's tokens came from, when it was first admitted; None before that, and of
        what was forked with tokens of its own."""
        return self._request.use

    @property
    def chunk_ids(self) -> tuple[int, ...]:
        """Chunks of the pool that hold its tokens now, in their order, those of a learned prefix
        first; empty where it has none. For the thread that advances the engine: they may change
        with each turn."""
        sequence = self._request.sequence
        return () if sequence is None else tuple(sequence.chunk_ids)

    @property
    def state(self) -> str:
        """ "waiting", "prefill", "decode" or "done"."""
        return "done" if self._request.dropped else self._request.phase.value

    @property
    def done(self) -> bool:
        return self.state == "done"

    @property
    def finish_reason(self) -> str | None:
        """None while it runs; then "stop", "length", "abort" or "error"."""
        reason = self._request.finish_reason
        return "abort" if reason is None and self._request.dropped else reason

    @property
    def error(self) -> BaseException | None:
        """What ended it, when `finish_reason` is "error"."""
        return self._request.error

    def stream(self) -> Stream:
        """Events as they come, those not read yet first; the last one has a `finish_reason`.

        Leaving the iteration early aborts the request, even before the first event. `close` aborts
        at once; after `break`, an exception, or when the iterator is dropped, the request is
        aborted when the engine is next used.

        Raises:
          RequestFailed: when an error ended the request, or the engine was closed.
        """
        return Stream(self._service, [self._request])

    def result(self) -> Completion:
        """The whole answer, when it is there.

        Raises:
          RequestFailed: when an error ended the request, or the engine was closed.
        """
        return self._service.wait(self._request)

    def abort(self) -> None:
        """Ends the request at once, wherever it stands. Harmless when it has ended already."""
        self._service.abort(self._request)

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
        handle = partial(RequestHandle, self._service)
        return self._service.fork(self._request, params, next_token, hold, handle)

    def hold(self) -> bool:
        """Keeps its chunks when it has ended, as if `submit` had been told to `hold`.

        Returns False when it has ended and they are held no longer: a fork finds in the cache what
        is left of them.
        """
        return self._service.hold(self._request)

    def release(self) -> None:
        """Gives up what `hold` keeps; the tokens stay readable. Harmless at any time."""
        self._service.let_go(self._request)

    def prune(self) -> None:
        """Ends this request and all forks of it, and forks of those, whoever has their handles.

        As `abort` and `release` of each, but at once: none of them decodes a token after others
        have ended, and if Ctrl-C comes in between, the rest is done before the engine does anything
        else. Tokens stay readable. Other samples of one `submit_samples` are no forks. Harmless at
        any time.
        """
        self._service.prune(self._request)


class PinnedPrefix:
    """A prefix kept in the pool; see `Engine.pin`."""

    def __init__(self, service: Service, pinned: Pinned):
        self._service = service
        self._pinned = pinned

    @property
    def num_tokens(self) -> int:
        """Tokens pinned: those of whole chunks."""
        return len(self._pinned.prompt)

    @property
    def computed(self) -> bool:
        """Whether all of it is in the pool."""
        return self._service.is_computed(self._pinned)

    def release(self) -> None:
        """Lets it be evicted like any other cached prefix. Harmless when it was released before."""
        self._service.unpin(self._pinned)
