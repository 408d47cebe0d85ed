"""Beam search over forks: hypotheses share all they have in common, in memory and in attention."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jax_chunkattn.engine.engine import Engine, Prompt
from jax_chunkattn.engine.handle import RequestHandle
from jax_chunkattn.sampling import MAX_LOGPROBS, SamplingParams


@dataclass(frozen=True)
class Hypothesis:
    """One answer of a beam search.

    Attributes:
      tokens: the answer; its last is a stop token unless it was cut off by `max_tokens`.
      logprob: of all tokens together, natural logarithm, by the model's own distribution.
      score: `logprob / len(tokens) ** length_penalty`, by which answers are ranked.
    """

    tokens: tuple[int, ...]
    logprob: float
    score: float


@dataclass
class _Beam:
    """A hypothesis that goes on: its tokens, and a finished request that knows what may follow."""

    tokens: tuple[int, ...]
    logprob: float
    handle: RequestHandle


def beam_search(
    engine: Engine,
    prompt: Prompt,
    *,
    beams: int = 4,
    max_tokens: int = 48,
    length_penalty: float = 1.0,
    stop_tokens: Collection[int] = (),
    salt: str = "",
    prefix: str | None = None,
) -> list[Hypothesis]:
    """The likeliest answers that a beam of width `beams` finds, the best first.

    Each step forks the hypotheses that go on: their sealed chunks are shared, their tails copied,
    and all of them decode one token in one call. Other requests of the engine advance meanwhile.

    Args:
      beams: hypotheses that go on at each step: the likeliest that have not ended. Those that end
        are answers when they are among the `2 * beams` likeliest. Also, most that are returned.
      max_tokens: most tokens of an answer.
      length_penalty: above 0 favours long answers; 0 ranks by probability.
      stop_tokens: end an answer.
      salt, prefix: as for `Engine.submit`.

    Raises:
      ValueError: when `beams` is not from 1 to half of `MAX_LOGPROBS`, or more than that together
        with the stop tokens, or `max_tokens` below 1.
      InvalidRequest, PoolExhausted, EngineClosed: as `Engine.submit`, for the longest answer.
      RequestFailed: when an error ended a hypothesis.
    """
    stops = frozenset(stop_tokens)
    if not 1 <= beams <= MAX_LOGPROBS // 2:
        raise ValueError(f"beams must be from 1 to {MAX_LOGPROBS // 2}, got {beams}")
    if beams + len(stops) > MAX_LOGPROBS:
        raise ValueError(
            f"beams and stop tokens must be at most {MAX_LOGPROBS} together, "
            f"got {beams} and {len(stops)}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")

    engine.check_request(prompt, SamplingParams(max_tokens), salt=salt, prefix=prefix)
    # Whichever stop tokens are among them, as many as there are beams go on from each hypothesis.
    num_likeliest = max(2 * beams, beams + len(stops))

    def one_more(tokens: tuple[int, ...]) -> SamplingParams:
        return SamplingParams(len(tokens) + 1, logprobs=num_likeliest, ignore_eos=True)

    def score(tokens: tuple[int, ...], logprob: float) -> float:
        return logprob / len(tokens) ** length_penalty

    done: list[Hypothesis] = []
    handles: list[RequestHandle] = []
    try:
        handles.append(engine.submit(prompt, one_more(()), salt=salt, prefix=prefix, hold=True))
        live = [_Beam((), 0.0, handles[0])]
        while live:
            candidates = sorted(
                (
                    (beam.logprob + logprob, (*beam.tokens, token), beam)
                    for beam in live
                    for token, logprob in beam.handle.result().logprobs[-1].top
                ),
                key=lambda candidate: -candidate[0],
            )
            parents, live = live, []
            for rank, (logprob, tokens, parent) in enumerate(candidates):
                if tokens[-1] in stops or len(tokens) == max_tokens:
                    if rank < 2 * beams:
                        done.append(Hypothesis(tokens, logprob, score(tokens, logprob)))
                elif len(live) < beams:
                    child = parent.handle.fork(one_more(tokens), next_token=tokens[-1], hold=True)
                    handles.append(child)
                    live.append(_Beam(tokens, logprob, child))
            for parent in parents:
                parent.handle.release()
            done = sorted(done, key=lambda one: -one.score)[:beams]
            if len(done) == beams and live and _cannot_win(live, done, length_penalty, max_tokens):
                break
    finally:
        for handle in handles:
            handle.abort()
            handle.release()
    return done


def _cannot_win(
    live: list[_Beam], done: list[Hypothesis], length_penalty: float, max_tokens: int
) -> bool:
    """Whether no hypothesis that goes on can come to score more than those that are done.

    A log-probability only falls; what it is divided by is largest at the largest length.
    """
    best = max(beam.logprob for beam in live)
    length = max_tokens if length_penalty > 0 else len(live[0].tokens) + 1
    return best / length**length_penalty <= done[-1].score
