"""Taking over what a call has chosen for requests, and scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jax_chunkattn.device.device import Results
from jax_chunkattn.engine.in_flight import ScoredPart
from jax_chunkattn.engine.lifecycle import Lifecycle
from jax_chunkattn.engine.requests import Request, Scored
from jax_chunkattn.engine.scheduler import Scheduler
from jax_chunkattn.engine.stats import EngineStats


class Recorder:
    """Adds chosen tokens to requests and scores to what is scored, and finds out which end."""

    def __init__(
        self,
        scheduler: Scheduler,
        lifecycle: Lifecycle,
        stats: EngineStats,
        stop_tokens: Sequence[int],
    ):
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._stats = stats
        self._stop_tokens = frozenset(stop_tokens)

    def record(self, request: Request, results: Results, row: int, *, decoded: bool) -> None:
        """Takes over what a call chose for a row: all of it, or nothing if an error occurs."""
        new, no_choice = results.tokens_of(row)
        if not new:
            if no_choice:
                return self._fail_by_numbers(request, request.num_tokens)
            raise RuntimeError(f"a call chose no token for {request}")
        stopped = new[-1] in self._stop_tokens_of(request)
        stream, text = request.text_stream, ""
        if stream is not None:
            try:
                stream = stream.copy()
                piece = stream.push(new[:-1] if stopped else new)
                text = piece.text
                if piece.stopped_after is not None:
                    stopped, new = True, new[: piece.stopped_after]
                elif stopped or len(request.tokens) + len(new) == request.params.max_tokens:
                    text += stream.finish()
            except Exception as error:
                return self._lifecycle.fail(request, error)
        logprobs = results.logprobs_of(row, request.params.logprobs, len(new))
        if decoded:
            self._scheduler.tree.append(request.placed, [request.tokens[-1], *new[:-1]])
            self._stats.decode_tokens += len(new)
        request.failures = 0
        if self._stats.weights_version not in request.weights[-1:]:
            request.weights.append(self._stats.weights_version)
        reason = None
        if stopped:
            reason = "stop"
        elif len(request.tokens) + len(new) == request.params.max_tokens:
            reason = "length"
        self._lifecycle.add(request, new, logprobs, text, stream=stream, finish_reason=reason)
        if reason is not None:
            self._lifecycle.finish(request)
        elif no_choice:
            self._fail_by_numbers(request, request.num_tokens)

    def record_scores(self, part: ScoredPart, results: Results) -> None:
        """Takes over what a call has scored for one work."""
        work = part.work
        scores = results.scores_of(part.places, work.top)
        for index, score in enumerate(scores):
            if math.isnan(score.chosen):
                return self._fail_by_numbers(work, part.position + index + 1)
        work.failures, work.version = 0, self._stats.weights_version
        self._stats.scored_tokens += len(scores)
        if work.put(part.position, scores):
            self._scheduler.finish(work)

    def _stop_tokens_of(self, request: Request) -> frozenset[int]:
        own = frozenset(request.params.stop_token_ids)
        return own if request.params.ignore_eos else own | self._stop_tokens

    def _fail_by_numbers(self, work: Request | Scored, position: int) -> None:
        """Ends work for which the model gave no numbers; what it computed serves nobody."""
        error = FloatingPointError(
            f"the model's logits for the token at position {position} are NaN or infinite: "
            "its weights are broken, or these tokens overflow in this dtype"
        )
        self._stats.not_finite += 1
        self._lifecycle.fail(work, error, discard=True)
