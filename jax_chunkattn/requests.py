"""What a session hands back: requests, what it did, how far it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from jax_chunkattn.planner import PlanSummary
from jax_chunkattn.sampling import SamplingParams
from jax_chunkattn.tree_nodes import SequenceHandle


@dataclass(eq=False)
class Request:
    """One prompt and what has been generated for it.

    `finish_reason` is None while it runs, then "stop" (a stop token, which is the last of `tokens`)
    or "length" (`sampling.max_tokens` of them).
    """

    prompt: tuple[int, ...]
    sampling: SamplingParams
    sequence: SequenceHandle
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def remaining(self) -> int:
        """Tokens it may still generate; 0 when it has finished."""
        return 0 if self.finish_reason else self.sampling.max_tokens - len(self.tokens)


@dataclass
class SessionStats:
    """What a session has done so far. Seconds are wall time and exclude compiling.

    `kv_bytes_held` is the most that was in use at once, in whole chunks, and `kv_bytes_unshared`
    what the same rows would have held at that moment without sharing. `plan` is what the planner
    decided when there was most to read.
    """

    prefill_tokens_computed: int = 0
    prefill_tokens_reused: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    compilations: int = 0
    compile_seconds: float = 0.0
    plans: int = 0
    plan_seconds: float = 0.0
    kv_bytes_held: int = 0
    kv_bytes_unshared: int = 0
    shared_tokens: int = 0
    plan: PlanSummary | None = None

    @property
    def plan_decision(self) -> str:
        if self.plan is None:
            return "nothing planned yet"
        return ("shared: " if self.plan.shared else "unshared: ") + self.plan.reason


@dataclass(frozen=True)
class Progress:
    """How far a `generate` is: tokens `done` of `total` in `phase` ("prefill" or "decode")."""

    phase: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]
