"""Which prefill calls compute the tokens that wait: one, or several smaller ones if they cost less.

Calls are padded to one of `CALL_TOKENS`, so 160 tokens in one call cost what 512 do. Where the time
of a call is nearly proportional to its tokens, calls of 128 and of 32 take less than half of that.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from jax_chunkattn.planning.options import PlannerOptions
from jax_chunkattn.planning.prefill import CALL_TOKENS, Span, ends_of_call

CPU_COSTS = {32: 161, 128: 297, 512: 1000}
"""By a call's tokens, what it takes in thousandths of the largest: of SmolLM2-135M in float32, with
native attention, on 2 cores of an x86 CPU; medians of the ratios within 9 rounds. A call of 256
would take 517."""

WORTH_SPLITTING = 0.85
"""Several calls take the place of one that holds all if they cost no more than this part of it: a
call of 512 with 160, 288 or 384 tokens takes 0.77, 0.83 or 0.92 of the time of a full one. So 384
tokens are one call: three of 128 took 1.03 of its time beside other processes (median of 9), and
0.94 by the fastest of each."""


def call_costs(options: PlannerOptions) -> Mapping[int, int] | None:
    """What calls cost where plans are made by these options; None where several small ones are
    taken to save nothing: on a GPU a small call too has all weights to read."""
    return CPU_COSTS if options.gpu is None else None


def calls_of_round(
    spans: Sequence[Span],
    most_tokens: int = CALL_TOKENS[-1],
    *,
    costs: Mapping[int, int] | None = CPU_COSTS,
    align: int = 1,
) -> list[int]:
    """The tokens of the calls, one after another, that compute these spans at the least cost.

    Of those that cost the same, the ones after which the spans are over soonest on average. One
    call that holds all is preferred unless the others are `WORTH_SPLITTING`. It is one call of
    `most_tokens`, for `next_call` to fill, where that cannot hold all, or costs are not known. A
    call takes what `ends_of_call` says.

    Args:
      spans: of positions, in their order.
      most_tokens: of all calls together.
      costs: of calls, by their tokens.
      align: parts of a span end at its end or at multiples of this.
    """
    sizes = [size for size in CALL_TOKENS if size <= most_tokens]
    spans = tuple(spans)
    if costs is None or rest_of(spans, most_tokens, align):
        return [most_tokens]
    # Dijkstra's algorithm. What is left only shrinks, so there are few states: a call of the
    # largest size costs less than four others.
    found: set[tuple[Span, ...]] = set()
    waiting: list[tuple[int, int, tuple[int, ...], tuple[Span, ...]]] = [(0, 0, (), spans)]
    while True:
        cost, waited, calls, left = heapq.heappop(waiting)
        if not left:
            one = next(size for size in sizes if not rest_of(spans, size, align))
            return [-size for size in calls] if cost <= WORTH_SPLITTING * costs[one] else [one]
        if left in found:
            continue
        found.add(left)
        for size in sizes:
            rest = rest_of(left, size, align)
            if rest != left:
                after = cost + costs[size]
                over = waited + after * (len(left) - len(rest))
                heapq.heappush(waiting, (after, over, (*calls, -size), rest))


def rest_of(spans: tuple[Span, ...], num_tokens: int, align: int = 1) -> tuple[Span, ...]:
    """What a call leaves of spans."""
    ends = ends_of_call(spans, num_tokens, align)
    if not ends:
        return spans
    begin, end = ends[-1], spans[len(ends) - 1][1]
    return (*([(begin, end)] if begin < end else []), *spans[len(ends) :])
