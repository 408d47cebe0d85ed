"""Whose exact last chunk lies in which slot, where full chunks are encoded.

A tail stays in its slot after its request has ended, until the slot's next request writes there. A
fork can begin with its parent's while that holds the chunk in which the fork's tokens end.
"""

from __future__ import annotations

from collections.abc import Iterable

from jax_chunkattn.engine.requests import Request


class Tails:
    """The request that has last written to each slot's tail."""

    def __init__(self, chunk_size: int):
        self._chunk_size = chunk_size
        self._owners: dict[int, tuple[int, ...]] = {}  # by their order, which no two share

    def to_begin_with(self, fork: Request) -> int | None:
        """The slot with a tail that `fork` can go on from; None if there is none any more."""
        parent, size, length = fork.parent, self._chunk_size, len(fork.history)
        if parent is None or fork.samples_next or not length % size:
            return None
        slot = parent.tail_slot
        if slot is None or self._owners.get(slot) != parent.order:
            return None
        holds_it = length <= parent.written <= -(-length // size) * size
        return slot if holds_it else None

    def claim(self, requests: Iterable[Request]) -> None:
        """These have been given their slots, and nothing in the tails there counts but what has
        been copied for them."""
        for request in requests:
            request.tail_slot = request.placed_slot
            self._owners[request.placed_slot] = request.order

    def forget(self) -> None:
        """All tails are gone."""
        self._owners.clear()
