"""Requests made of what callers ask for, checked before anything changes.

Whatever takes time with a long prompt or many samples happens here, outside the engine's turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from jax_chunkattn.engine.admission import (
    InvalidRequest,
    ModelSizes,
    RequestLimits,
    check_params,
    check_positions,
    check_priority,
    check_prompt,
    check_sampling,
    check_text,
    check_top,
)
from jax_chunkattn.engine.requests import Pinned, Request, Scored, ScoreGroup
from jax_chunkattn.engine.text import TextStream, Tokenizer, open_stream
from jax_chunkattn.engine.virtual_tokens import VirtualTokens
from jax_chunkattn.sampling import SamplingParams, TokenLogprobs, each_sample, fork_seed

Prompt = Sequence[int] | str


class Incoming:
    """Makes requests for one engine; all its methods raise InvalidRequest for what is none.

    Attributes:
      prefixes: the learned prefixes that there are, by name.
    """

    def __init__(
        self,
        model: ModelSizes,
        tokenizer: Tokenizer | None,
        limits: RequestLimits,
        *,
        sharing: bool,
    ):
        self._model = model
        self._tokenizer = tokenizer
        self._limits = limits
        self._sharing = sharing
        self._arrivals = count()
        self.prefixes: dict[str, VirtualTokens] = {}

    def samples(
        self,
        prompt: Prompt,
        params: SamplingParams,
        salt: str,
        *,
        priority: int = 0,
        hold: bool = False,
        chosen: Sequence[int] = (),
        prefix: str | None = None,
        name: str = "the prompt",
    ) -> list[Request]:
        """A request for each of the samples that `params` ask for, each with the same tokens
        `chosen` before, behind a learned `prefix`; `name` stands for the prompt in messages."""
        check_sampling(params, self._limits, name)
        tokens, virtual = self._tokens(prompt, name), self.virtual(prefix)
        check_params(params, len(tokens), self._model, name, virtual=_count(virtual))
        stream, begun, text = self._text_stream(params, name), [], ""
        if len(chosen):
            begun = list(check_prompt(chosen, self._model, "chosen"))
            text = _text_of(begun, params, stream, name)
        unknown = [] if params.logprobs is None else [TokenLogprobs(math.nan)] * len(begun)
        priority, encoded = check_priority(priority), check_text(salt, "the salt")
        return [
            Request(
                tokens,
                self._salt(encoded),
                (priority, next(self._arrivals)),
                one,
                stream and stream.copy(),
                hold=hold,
                tokens=list(begun),
                text=text,
                logprobs=list(unknown),
                virtual=virtual,
            )
            for one in each_sample(params)
        ]

    def learned(self, virtual: VirtualTokens) -> Pinned:
        """A learned prefix, to be written and kept."""
        what = f"prefix {virtual.name!r}"
        check_positions(1, 0, self._model, what, virtual=len(virtual.ids))
        return Pinned((), self._salt(b""), (0, next(self._arrivals)), virtual=virtual)

    def pinned(
        self, prompt: Prompt, salt: str, chunk_size: int, prefix: str | None = None
    ) -> Pinned:
        """The whole chunks of a prefix, behind a learned one if that is given."""
        tokens, virtual = self._tokens(prompt, "the prompt"), self.virtual(prefix)
        check_positions(len(tokens), 0, self._model, "the prompt", virtual=_count(virtual))
        whole = len(tokens) // chunk_size * chunk_size
        if not whole:
            raise InvalidRequest(
                f"a prefix of {len(tokens)} tokens fills no chunk of {chunk_size}: nothing to pin"
            )
        encoded = check_text(salt, "the salt")
        order = 0, next(self._arrivals)
        return Pinned(tokens[:whole], self._salt(encoded), order, virtual=virtual)

    def scored(
        self,
        prefix: Prompt,
        continuations: Sequence[Prompt],
        salt: str,
        top: int,
        name: str,
        learned: str | None = None,
    ) -> list[Scored]:
        """Each continuation of a prefix, to be scored, behind a `learned` one if that is given;
        `name` stands for the prefix in messages."""
        if isinstance(continuations, str) or not isinstance(continuations, Sequence):
            raise InvalidRequest(
                f"continuations must be a sequence of them, got {continuations!r:.60}"
            )
        check_top(top)
        begin, encoded = self._tokens(prefix, name), check_text(salt, "the salt")
        virtual = self.virtual(learned)
        group, shared = ScoreGroup(), self._salt(encoded)
        works = []
        for index, continuation in enumerate(continuations):
            one = f"continuation {index} of {name}"
            *tokens, last = self._tokens(continuation, one)
            size = len(begin) + len(tokens)
            check_positions(size, 0, self._model, one, virtual=_count(virtual))
            own = shared if self._sharing else self._salt(encoded)
            order = 0, next(self._arrivals)
            given, which = (*begin, *tokens), (last, len(begin), top, group)
            works.append(Scored(given, own, order, *which, virtual=virtual))
        return works

    def fork(
        self, parent: Request, params: SamplingParams | None, next_token: int | None, hold: bool
    ) -> Request:
        """A request that goes on from where `parent` stands."""
        if params is None:
            params = replace(parent.params, seed=fork_seed(parent.seed, parent.num_forks))
        check_sampling(params, self._limits, "the fork")
        virtual = parent.num_virtual
        check_params(params, len(parent.prompt), self._model, "the fork", virtual=virtual)
        if params.n != 1:
            raise InvalidRequest(f"fork starts one, n is {params.n}: fork as often")
        tokens = list(parent.tokens)
        if next_token is not None:
            if not tokens:
                raise InvalidRequest("next_token replaces the last chosen token; there is none yet")
            check_prompt([next_token], self._model, "next_token")
            tokens[-1] = next_token
        elif parent.finish_reason == "stop":
            raise InvalidRequest("the request has stopped: a fork needs a next_token to go on with")
        stream = self._text_stream(params, "the fork")
        text = _text_of(tokens, params, stream, "the fork")
        return Request(
            parent.prompt,
            parent.salt,
            (parent.order[0], next(self._arrivals)),
            next(iter(each_sample(params))),
            stream,
            hold=hold,
            tokens=tokens,
            text=text,
            logprobs=parent.logprobs_for_fork(params, next_token),
            weights=list(parent.weights),
            virtual=parent.virtual,
        )

    def _tokens(self, prompt: Any, name: str) -> tuple[int, ...]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise InvalidRequest(f"{name} that is text needs an engine with a tokenizer")
            check_text(prompt, name)
            prompt = self._tokenizer.encode(prompt)
        return check_prompt(prompt, self._model, name)

    def virtual(self, prefix: str | None) -> VirtualTokens | None:
        """Those of the learned prefix of a name."""
        if prefix is None:
            return None
        found = self.prefixes.get(prefix) if isinstance(prefix, str) else None
        if found is None:
            there = ", ".join(map(repr, list(self.prefixes)[:8])) or "none"
            raise InvalidRequest(
                f"there is no learned prefix {prefix!r:.60}; there are: {there} (add_prefix)"
            )
        return found

    def _salt(self, salt: bytes) -> bytes:
        """Unshared requests get a salt that no text is: it is not UTF-8."""
        return salt if self._sharing else b"\xff%d" % next(self._arrivals)

    def _text_stream(self, params: SamplingParams, name: str) -> TextStream | None:
        try:
            return open_stream(self._tokenizer, params.stop)
        except ValueError as error:
            raise InvalidRequest(f"{name}: {error}") from None


def _count(virtual: VirtualTokens | None) -> int:
    return len(virtual.ids) if virtual is not None else 0


def _text_of(
    tokens: Sequence[int], params: SamplingParams, stream: TextStream | None, name: str
) -> str:
    """The text that a request begins with, which its stream goes on from."""
    if len(tokens) >= params.max_tokens:
        raise InvalidRequest(
            f"{name} begins with {len(tokens)} chosen tokens, max_tokens is {params.max_tokens}: "
            "it must be larger"
        )
    if stream is None:
        return ""
    piece = stream.push(tokens)
    if piece.stopped_after is not None:
        raise InvalidRequest(f"{name} begins with a text that has a stop string in it")
    return piece.text
