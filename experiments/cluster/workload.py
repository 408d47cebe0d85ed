"""Requests of a fleet: when they come, and their tokens, prompt and answer.

Tokens are numbers that stand for themselves: equal where prompts are equal, and never else. A
router and a tree see no more of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from experiments.cluster.config import REQUESTS, ClusterConfig
from experiments.harness.errors import UserError
from experiments.trace import BLOCK_TOKENS, TraceRequest, read_trace


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request.

    Attributes:
      due: when it comes, in seconds.
      prompt, answer: their tokens, by count.
      parts: where each part of prompt and answer begins among all tokens there are, and its length.
    """

    due: float
    prompt: int
    answer: int
    parts: tuple[tuple[int, int], ...]

    def tokens(self) -> np.ndarray:
        """Int32 [prompt + answer]."""
        return np.concatenate(
            [np.arange(begin, begin + count, dtype=np.int32) for begin, count in self.parts]
        )


@dataclass(frozen=True)
class Workload:
    """Requests in the order they come."""

    name: str
    arrivals: tuple[Arrival, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(one.prompt for one in self.arrivals)

    def stretched(self, seconds: float) -> Workload:
        """The same within so many seconds, from the first to the last."""
        first = self.arrivals[0].due
        factor = seconds / max(self.arrivals[-1].due - first, 1e-9)
        return replace(
            self,
            arrivals=tuple(replace(one, due=(one.due - first) * factor) for one in self.arrivals),
        )


def make_workload(config: ClusterConfig) -> Workload:
    """The workload that the options name. Raises UserError when the trace cannot be used."""
    return _of_trace(config) if config.trace is not None else _made_up(config)


def _of_trace(config: ClusterConfig) -> Workload:
    assert config.trace is not None
    requests = read_trace(config.trace)[: config.requests]
    if config.requests is not None and len(requests) < config.requests:
        raise UserError(f"--requests {config.requests}: --trace {config.trace} has {len(requests)}")
    block = BLOCK_TOKENS // config.scale
    first_answer = (1 + max(max(request.blocks) for request in requests)) * block
    last = first_answer + sum(request.output_tokens for request in requests)
    if last >= 2**31:
        raise UserError(f"--trace {config.trace} has ids of blocks beyond {2**31 // block}")
    arrivals, answers = [], first_answer
    for request in requests:
        arrivals.append(_trace_arrival(request, answers, config.scale))
        answers += arrivals[-1].answer
    name = f"trace {config.trace.name}"
    return Workload(name if config.scale == 1 else f"{name} / {config.scale}", tuple(arrivals))


def _trace_arrival(request: TraceRequest, begin: int, scale: int) -> Arrival:
    """The answer, which a trace does not tell, is nobody else's: it begins at `begin`."""
    block, prompt = BLOCK_TOKENS // scale, -(-request.input_tokens // scale)
    answer = -(-request.output_tokens // scale)
    whole, rest = divmod(prompt, block)
    parts = [(number * block, block) for number in request.blocks[:whole]]
    if rest:
        parts.append((request.blocks[whole] * block, rest))
    return Arrival(request.seconds, prompt, answer, (*parts, (begin, answer)))


def _made_up(config: ClusterConfig) -> Workload:
    """Turns of conversations. A turn's prompt is the tenant's system prompt, all questions and
    answers before, and a question. Conversations begin at any time of the replay; turns of one, and
    tokens of each part, have geometric distributions, pauses between turns an exponential one."""
    random = np.random.default_rng(config.seed)
    requests = config.requests or REQUESTS

    def lengths(mean: float, count: int) -> list[int]:
        return random.geometric(1 / mean, count).tolist()

    popularity = np.arange(1, config.tenants + 1.0) ** -config.zipf
    system = lengths(config.system_tokens, config.tenants)
    begins = np.concatenate([[0], np.cumsum(system)]).tolist()
    used, arrivals = begins[-1], []
    while len(arrivals) < requests:
        tenant = int(random.choice(config.tenants, p=popularity / popularity.sum()))
        due, own = float(random.uniform()), 0
        [turns] = lengths(config.turns, 1)
        questions = lengths(config.question_tokens, turns)
        answers = lengths(config.answer_tokens, turns)
        for question, answer in zip(questions, answers, strict=True):
            parts = (begins[tenant], system[tenant]), (used, own + question + answer)
            prompt = system[tenant] + own + question
            arrivals.append(Arrival(due, prompt, answer, parts))
            own += question + answer
            due += float(random.exponential(config.pause))
        used += own
        if used >= 2**31:
            raise UserError(f"--requests {requests} of such lengths have more than 2^31 tokens")
    arrivals = sorted(arrivals[:requests], key=_due)
    return Workload(f"{config.tenants} tenants' conversations, made up", tuple(arrivals))


def _due(arrival: Arrival) -> float:
    return arrival.due


def span_at_load(seconds: Sequence[float], replicas: int, load: float) -> float:
    """In how long requests that take so long are to come, for such a load of a fleet."""
    return sum(seconds) / (replicas * load)
