"""What a soak proves: each check returns what does not hold, in words, or nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from experiments.soak.account import Account, Finished
from jax_chunkattn import Completion, Engine
from jax_chunkattn.sampling import MAX_LOGPROBS
from pallas_kernels.codecs import IDENTITY

MEMORY_GROWTH = 0.02
TIE = 1e-4
"""Log-probabilities closer than this may change places with the batch's shape."""
_CODED_TIES = {"int2": 6.0, "int4/int2": 6.0, "int4": 0.5}
_CODED_TIE = 0.1
"""What a chunk's codes are can hang on the last bit of a number, so a codec makes rounding errors
of the batch's shape larger: logits of one prompt, computed in one piece and in several, differ by
6e-5 without a codec, 0.04 with 8 bits, 0.26 with 4 and 5.4 with 2 (SmolLM2, 384 tokens)."""


def memory_growth(resident: Sequence[int]) -> float | None:
    """The median of the last quarter over that of the first, less one; None for under 8 samples."""
    quarter = len(resident) // 4
    if quarter < 2:
        return None
    return statistics.median(resident[-quarter:]) / statistics.median(resident[:quarter]) - 1


def check_memory(growth: float | None) -> Iterator[str]:
    if growth is not None and growth > MEMORY_GROWTH:
        yield f"resident memory grew by {growth:.1%}, more than {MEMORY_GROWTH:.0%}"


def check_compilations(by_engine: int, by_jax: int) -> Iterator[str]:
    """Programs obtained since the engine was warm, as the engine counts and as JAX does."""
    if by_engine or by_jax:
        yield f"{max(by_engine, by_jax)} programs were compiled after the warm-up"


def check_requests(account: Account, stats: Any) -> Iterator[str]:
    """None is lost, and the engine counted them as we did."""
    if account.live:
        yield f"{len(account.live)} of {account.started} requests never ended"
    if account.num_problems:
        yield f"{account.num_problems} requests went wrong, such as: {'; '.join(account.problems)}"
    ours = {
        "submitted": account.started,
        "finished": account.ended["stop"] + account.ended["length"],
        "aborted": account.ended["abort"],
        "failed": account.ended["error"],
    }
    theirs = {name: getattr(stats, name) for name in ours}
    if ours != theirs:
        yield f"the engine counts {theirs}, the soak {ours}"


def check_chunks(engine: Engine, num_chunks: int) -> Iterator[str]:
    """With nothing running, held or pinned, all chunks are free or cached; after a reset, free."""
    stats = engine.stats
    if stats.chunks_in_use or stats.chunks_free + stats.chunks_cached != num_chunks:
        yield (
            f"with nothing running {stats.chunks_in_use} of {num_chunks} chunks are in use, "
            f"{stats.chunks_cached} cached and {stats.chunks_free} free"
        )
    engine.reset()
    if engine.stats.chunks_free != num_chunks:
        yield f"after a reset {engine.stats.chunks_free} of {num_chunks} chunks are free"


def invariant_broken(engine: Engine) -> Iterator[str]:
    """What `Engine.check` finds."""
    try:
        engine.check()
    except AssertionError as error:
        yield f"the engine's invariants are broken: {error}"


@dataclass(frozen=True)
class Difference:
    """A greedy answer that a fresh engine does not give.

    Attributes:
      finished: what the soak's engine answered.
      again: what the fresh one does, to the same request alone.
      position: of the first token that differs.
      gap: how much likelier the fresh engine's token is there, in log-probability, before
        penalties and biases; None where that is not known.
      tie: how close log-probabilities may be to change places.
    """

    finished: Finished
    again: Completion
    position: int
    gap: float | None
    tie: float = TIE

    @property
    def is_tie(self) -> bool:
        """Whether both tokens are equally likely, as far as the batch's shape lets numbers be."""
        params = self.finished.params
        changed = params.has_penalties or params.logit_bias
        return self.gap is not None and abs(self.gap) < self.tie and not changed

    def __str__(self) -> str:
        tokens = [one[self.position :][:1] for one in (self.finished.tokens, self.again.tokens)]
        gap = "unknown" if self.gap is None else f"{self.gap:.2g}"
        return (
            f"an answer to {len(self.finished.prompt)} tokens has {tokens[0]} at {self.position}, "
            f"a fresh engine's {tokens[1]}, likelier by {gap}"
        )


def recheck(make_engine: Callable[[], Engine], sample: Sequence[Finished]) -> list[Difference]:
    """Computes each request again, alone, on a fresh engine; returns the answers that differ."""
    differences = []
    with make_engine() as engine:
        tie = tie_of(engine.stats.codec)
        for finished in sample:
            params = replace(finished.params, logprobs=MAX_LOGPROBS)
            again = engine.submit(finished.prompt, params).result()
            if again.tokens != finished.tokens:
                differences.append(replace(_difference(finished, again), tie=tie))
    return differences


def tie_of(codec: str) -> float:
    """How close log-probabilities may be to change places, with a pool of that codec."""
    return TIE if codec == IDENTITY else _CODED_TIES.get(codec, _CODED_TIE)


def check_answers(differences: Sequence[Difference]) -> Iterator[str]:
    wrong = [difference for difference in differences if not difference.is_tie]
    if wrong:
        yield f"{len(wrong)} greedy answers differ from those of a fresh engine: {wrong[0]}"


def _difference(finished: Finished, again: Completion) -> Difference:
    pairs = list(zip(finished.tokens, again.tokens, strict=False))
    at = next((index for index, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
    gap = None
    if at < len(pairs):
        logprobs = dict(again.logprobs[at].top)
        mine, other = pairs[at]
        if mine in logprobs and other in logprobs:
            gap = logprobs[other] - logprobs[mine]
    return Difference(finished, again, at, gap)
