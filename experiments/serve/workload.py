"""The requests of a run: prompts made of blocks of random tokens, and when each comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.serve.config import ServeConfig
from experiments.trace import TraceRequest

_TRACE_BLOCKS, _SYSTEM_PROMPTS, _OWN_TOKENS, _GAPS = range(4)  # streams of random numbers


@dataclass(frozen=True)
class ServedRequest:
    """Attributes:
    due: seconds after the first request that it comes, if requests come in time.
    """

    due: float
    prompt: tuple[int, ...]
    output_tokens: int


@dataclass(frozen=True)
class Workload:
    """Requests in the order they come; `cut_prompts` and `cut_outputs` of them lost their ends."""

    requests: tuple[ServedRequest, ...]
    cut_prompts: int
    cut_outputs: int

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)


def trace_workload(
    trace: Sequence[TraceRequest], config: ServeConfig, *, vocab_size: int, max_positions: int
) -> Workload:
    """The requests of a trace, scaled: equal block ids make equal tokens."""
    maker = _Maker(config, vocab_size, max_positions)
    speed = config.speed or 1.0
    for request in trace:
        blocks = [
            maker.random_tokens(_TRACE_BLOCKS, block, config.block_tokens)
            for block in request.blocks
        ]
        prompt = np.concatenate(blocks)[: maker.scaled(request.input_tokens)]
        due = (request.seconds - trace[0].seconds) / speed
        maker.add(due, prompt, maker.scaled(request.output_tokens))
    return maker.workload()


def made_up_workload(config: ServeConfig, *, vocab_size: int, max_positions: int) -> Workload:
    """Requests with prompts of their own behind system prompts, in turns; the first comes at 0."""
    maker = _Maker(config, vocab_size, max_positions)
    random = np.random.default_rng((config.seed, _GAPS))
    gaps = random.exponential(1 / (config.rate or 1.0), config.requests)
    for index, due in enumerate(np.cumsum(gaps) - gaps[0]):
        system = maker.random_tokens(
            _SYSTEM_PROMPTS, index % config.system_prompts, maker.scaled(config.shared_tokens)
        )
        own = maker.random_tokens(_OWN_TOKENS, index, maker.scaled(config.own_tokens))
        prompt = np.concatenate([system, own])
        maker.add(float(due), prompt, maker.scaled(config.completion_tokens))
    return maker.workload()


@dataclass
class _Maker:
    """Scales lengths, and cuts what the model has no positions for: first an answer to half of
    them, then the prompt to what the answer leaves."""

    config: ServeConfig
    vocab_size: int
    max_positions: int
    requests: list[ServedRequest] = field(default_factory=list)
    cut_prompts: int = 0
    cut_outputs: int = 0

    def scaled(self, tokens: int) -> int:
        return -(-tokens // self.config.scale)

    def random_tokens(self, stream: int, number: int, count: int) -> np.ndarray:
        """Always the same for a stream and number."""
        random = np.random.default_rng((self.config.seed, stream, number))
        return random.integers(0, self.vocab_size, count, np.int32)

    def add(self, due: float, prompt: np.ndarray, output_tokens: int) -> None:
        kept_output = min(output_tokens, self.max_positions // 2)
        kept_prompt = prompt[: self.max_positions - kept_output]
        self.cut_outputs += kept_output < output_tokens
        self.cut_prompts += len(kept_prompt) < len(prompt)
        self.requests.append(ServedRequest(due, tuple(kept_prompt.tolist()), kept_output))

    def workload(self) -> Workload:
        return Workload(tuple(self.requests), self.cut_prompts, self.cut_outputs)
