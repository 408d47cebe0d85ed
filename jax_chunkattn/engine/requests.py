"""What the engine knows of each request: its tokens, and where it stands."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import ref

from jax_chunkattn.engine.lineage import Lineage
from jax_chunkattn.engine.misses import PromptUse
from jax_chunkattn.engine.outputs import Completion, RequestFailed, Score, StreamEvent
from jax_chunkattn.engine.text import TextStream
from jax_chunkattn.engine.virtual_tokens import VirtualTokens
from jax_chunkattn.planning.scored_tokens import UNSCORED
from jax_chunkattn.sampling import SamplingParams, TokenLogprobs
from jax_chunkattn.tree.nodes import SequenceHandle


class Phase(enum.Enum):
    """Where a request stands.

    WAITING for admission (for the first time, or again after a preemption); PREFILL while a part
    of its tokens has no keys and values; DECODE, or scores on their way; DONE, for whatever reason.
    """

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"


@dataclass(eq=False)
class Work:
    """Tokens that shall be in the pool, for a request, to be pinned, or to be scored.

    Attributes:
      order: when its turn is: (priority, arrival).
      virtual: of the learned prefix that its prompt is behind; None where that is the first.
      sequence: its place in the tree, while it has one.
      found: tokens that others had computed when it was placed there.
      dispatched: tokens whose keys and values it has computed itself, or found, up to here.
      failures: errors while it was being computed, since it last chose a token or was scored.
      error: what ended it, if an error did.
    """

    prompt: tuple[int, ...]
    salt: bytes
    order: tuple[int, ...]
    virtual: VirtualTokens | None = field(default=None, kw_only=True)
    phase: Phase = field(default=Phase.WAITING, init=False)
    sequence: SequenceHandle | None = field(default=None, init=False)
    found: int = field(default=0, init=False)
    dispatched: int = field(default=0, init=False)
    failures: int = field(default=0, init=False)
    error: BaseException | None = field(default=None, init=False)

    @property
    def num_virtual(self) -> int:
        """Virtual tokens before its prompt."""
        return len(self.virtual.ids) if self.virtual is not None else 0

    @property
    def given(self) -> tuple[int, ...]:
        """The tokens it comes with, as the tree knows them: virtual ones, and its prompt."""
        return self.prompt if self.virtual is None else (*self.virtual.ids, *self.prompt)

    @property
    def num_given(self) -> int:
        return self.num_virtual + len(self.prompt)

    @property
    def namespace(self) -> bytes:
        """What tells its prompt from an equal one that has other keys and values, or may not be
        found by this."""
        return self.salt if self.virtual is None else self.salt + self.virtual.namespace

    @property
    def history(self) -> Sequence[int]:
        """The tokens whose keys and values it needs before it can go on."""
        return self.given

    @property
    def begun(self) -> bool:
        """Whether something of it depends on the weights that it was computed by."""
        return False

    @property
    def needed_from(self) -> int:
        """The first of these tokens that is to be computed though its keys and values are there."""
        return len(self.history)

    @property
    def like(self) -> SequenceHandle | None:
        """A sequence of which the beginning of a chunk may be taken over, if it is active."""
        return None

    def raise_error(self) -> None:
        """Raises RequestFailed when an error ended it."""
        if self.error is not None:
            raise RequestFailed(f"the request failed: {self.error}") from self.error

    @property
    def placed(self) -> SequenceHandle:
        assert self.sequence is not None, "not in the tree"
        return self.sequence


@dataclass(eq=False)
class Pinned(Work):
    """A prefix that stays in the pool until it is released: of tokens, or a learned one alone."""


@dataclass(eq=False)
class ScoreGroup:
    """Continuations of one prefix.

    Attributes:
      waiting: those that come when the prefix has been computed for the first.
      computed: the last one that was computed: its own chunks begin as others' do.
    """

    waiting: list[Scored] = field(default_factory=list)
    computed: Scored | None = None

    def forget(self) -> None:
        """Whatever was computed is gone, and who waits waits no longer."""
        self.waiting, self.computed = [], None


@dataclass(eq=False)
class Scored(Work):
    """A prefix with tokens behind it that are to be scored.

    The prompt has all of them but the last, whose keys and values nobody needs.

    Attributes:
      last: that one.
      prefix: tokens of the prefix.
      top: how many of the likeliest tokens are reported.
      version: of the model's weights that it was scored by.
    """

    last: int
    prefix: int
    top: int
    group: ScoreGroup
    version: int = field(default=0, init=False)
    _found: list[TokenLogprobs | None] = field(init=False)

    def __post_init__(self) -> None:
        self.begin_again()

    def begin_again(self) -> None:
        """As if nothing had been scored."""
        self._found = [None] * (len(self.prompt) + 1 - self.prefix)

    @property
    def begun(self) -> bool:
        return any(score is not None for score in self._found)

    @property
    def needed_from(self) -> int:
        """The prefix's last token says what the first behind it scores."""
        return max(self.num_virtual + self.prefix - 1, self.dispatched)

    @property
    def like(self) -> SequenceHandle | None:
        computed = self.group.computed
        return computed.sequence if computed is not None else None

    def targets(self, begin: int) -> list[int]:
        """What follows each token from a position on, `UNSCORED` where that is not to be scored."""
        begin -= self.num_virtual
        first = max(begin, self.prefix - 1)
        return [UNSCORED] * (first - begin) + [*self.prompt[first + 1 :], self.last]

    def put(self, position: int, scores: Sequence[TokenLogprobs]) -> bool:
        """Takes over scores of what follows the first token that is scored from a position on;
        whether they are all there now."""
        begin = max(position - self.num_virtual + 1 - self.prefix, 0)
        self._found[begin : begin + len(scores)] = scores
        return None not in self._found

    def answer(self) -> Score | None:
        """Its score; None before it is there, and when an error ended it."""
        if self.phase is not Phase.DONE or self.error is not None:
            return None
        tokens = (*self.prompt[self.prefix :], self.last)
        found = tuple(score for score in self._found if score is not None)
        return Score(tokens, found, self.version)


class Reader(ref):
    """What is known of an iteration over requests, so that it can be dropped at any moment.

    When the iteration dies, this is given to the callback. That should be a function of C, which
    no signal interrupts: an exception in a finaliser written in Python goes nowhere, and takes the
    rest of the finaliser with it.

    Attributes:
      requests: that it reads.
      over: it has come to its end, or they have been aborted.
      left: it will not be read to its end, though it lives.
    """

    __slots__ = ("left", "over", "requests")

    def __new__(cls, iteration: object, on_death: Callable[[Reader], None], *_: object) -> Reader:
        return super().__new__(cls, iteration, on_death)

    def __init__(
        self, iteration: object, on_death: Callable[[Reader], None], requests: tuple[Request, ...]
    ):
        self.requests = requests
        self.over = False
        self.left = False
        for request in requests:
            request.readers.append(self)

    def end(self) -> None:
        """The iteration is over: it and the requests refer to one another no longer."""
        self.over = True
        requests, self.requests = self.requests, ()
        for request in requests:
            if self in request.readers:
                request.readers.remove(self)

    @property
    def was_dropped(self) -> bool:
        """Whether its requests shall be aborted."""
        return not self.over and (self.left or self() is None)


class Addition(NamedTuple):
    """What one call to the device adds to a request, and how the request stands with it.

    Attributes:
      number: how many came before it.
      begin: tokens there were before it.
      tokens, logprobs: that follow them.
      text: all of the text with it, and `stream` what gives the text to come.
      finish_reason: None while the request goes on.
    """

    number: int
    begin: int
    tokens: Sequence[int]
    logprobs: tuple[TokenLogprobs, ...]
    text: str
    stream: TextStream | None
    finish_reason: str | None


@dataclass(eq=False)
class Request(Work):
    """One sequence to decode.

    `in_flight` counts, of calls to the device whose results are not here yet, the tokens they can
    choose for this request; `writes_in_flight` the positions they can write. `siblings` are samples
    of the same prompt that wait to be forked from this one; `parent` is what this one was forked
    from, until it is first admitted; `lineage` says so for good. `tail_slot` is where its exact
    last chunk lies, and `written` how many positions may have been written when that was
    (`engine.tails`). `ends` are how many tokens and characters there were after each addition,
    `num_read` and `num_told` how many additions a stream and the callback have had. `weights` are
    the versions of the model's that its tokens were chosen by. `use` is where its prompt's tokens
    came from, when it was first admitted; None before, and of forks.
    """

    params: SamplingParams
    text_stream: TextStream | None = None
    on_event: Callable[[StreamEvent], None] | None = None
    hold: bool = False
    siblings: list[Request] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    readers: list[Reader] = field(default_factory=list, init=False)
    ends: list[tuple[int, int]] = field(default_factory=list, init=False)
    num_read: int = field(default=0, init=False)
    num_told: int = field(default=0, init=False)
    slot: int | None = field(default=None, init=False)
    in_flight: int = field(default=0, init=False)
    writes_in_flight: int = field(default=0, init=False)
    num_forks: int = field(default=0, init=False)
    parent: Request | None = field(default=None, init=False)
    lineage: Lineage = field(init=False)
    tail_slot: int | None = field(default=None, init=False)
    written: int = field(default=0, init=False)
    admitted: bool = field(default=False, init=False)
    use: PromptUse | None = field(default=None, init=False)
    _adding: Addition | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.lineage = Lineage(self)
        # What a fork has of its parent's answer is in none of its events.
        self._begin = len(self.tokens), len(self.text)

    @property
    def dropped(self) -> bool:
        """Whether somebody has left off reading it: it shall be aborted."""
        return any(reader.was_dropped for reader in self.readers)

    @property
    def begun(self) -> bool:
        return bool(self.tokens)

    @property
    def seed(self) -> int:
        assert self.params.seed is not None, "a seed is drawn when a request is made"
        return self.params.seed

    @property
    def history(self) -> Sequence[int]:
        """All but the last chosen token, which the next decode step feeds."""
        return (*self.given, *self.tokens[:-1]) if len(self.tokens) > 1 else self.given

    @property
    def samples_next(self) -> bool:
        """Whether its prefill chooses a token from the last position's logits."""
        return not self.tokens

    @property
    def needed_from(self) -> int:
        return len(self.history) - self.samples_next

    @property
    def num_tokens(self) -> int:
        """Virtual ones, of the prompt, and chosen."""
        return self.num_given + len(self.tokens)

    @property
    def placed_slot(self) -> int:
        assert self.slot is not None, "not running"
        return self.slot

    @property
    def may_choose(self) -> int:
        """Tokens it can still choose in calls to come, if it does not stop before."""
        return self.params.max_tokens - len(self.tokens) - self.in_flight

    @property
    def wants_logprobs(self) -> bool:
        return self.params.logprobs is not None

    def logprobs_for_fork(
        self, params: SamplingParams, next_token: int | None
    ) -> list[TokenLogprobs]:
        """Of the tokens a fork begins with, if it asks for any: NaN for what is not known."""
        if params.logprobs is None:
            return []
        logprobs = list(self.logprobs) or [TokenLogprobs(math.nan)] * len(self.tokens)
        if next_token is not None:
            logprobs[-1] = logprobs[-1].of(next_token)
        return logprobs

    def add(
        self,
        tokens: Sequence[int] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        text: str = "",
        *,
        stream: TextStream | None = None,
        finish_reason: str | None = None,
    ) -> None:
        """Takes over what a call chose, or that nothing more will come.

        As a whole: where Ctrl-C breaks it off, `finish_adding` does the rest.
        """
        self._adding = Addition(
            len(self.ends),
            len(self.tokens),
            tokens,
            logprobs,
            self.text + text,
            stream or self.text_stream,
            finish_reason,
        )
        self.finish_adding()

    def finish_adding(self) -> None:
        """Does what is left of an `add` that was broken off; nothing if none was."""
        adding = self._adding
        if adding is None:
            return
        self.tokens[adding.begin :] = adding.tokens
        if adding.logprobs:
            self.logprobs[adding.begin :] = adding.logprobs
        self.text, self.text_stream = adding.text, adding.stream
        self.ends[adding.number :] = [(len(self.tokens), len(self.text))]
        self.finish_reason = adding.finish_reason
        self._adding = None

    def next_event(self) -> StreamEvent | None:
        """The next event for a stream; None when all there is has been read."""
        if self.num_read == len(self.ends):
            return None
        event = self._event(self.num_read)
        self.num_read += 1
        return event

    @property
    def untold(self) -> StreamEvent | None:
        """The next event for the callback; None when it knows all there is."""
        return self._event(self.num_told) if self.num_told < len(self.ends) else None

    def _event(self, number: int) -> StreamEvent:
        """What addition `number` was."""
        first_token, first_character = self.ends[number - 1] if number else self._begin
        last_token, last_character = self.ends[number]
        is_last = number + 1 == len(self.ends) and self.finish_reason != "error"
        return StreamEvent(
            tuple(self.tokens[first_token:last_token]),
            self.text[first_character:last_character],
            tuple(self.logprobs[first_token:last_token]),
            self.finish_reason if is_last else None,
        )

    def answer(self) -> Completion | None:
        """The whole answer; None before it is there, and when an error ended it."""
        if self.phase is not Phase.DONE or self.error is not None:
            return None
        assert self.finish_reason is not None, "not finished"
        return Completion(
            tuple(self.tokens),
            self.text,
            tuple(self.logprobs),
            self.finish_reason,
            self.seed,
            tuple(self.weights),
        )
