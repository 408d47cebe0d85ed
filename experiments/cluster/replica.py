"""A replica without a device: the engine's schedule over its prefix tree, with simulated time.

As in the engine, requests are served first come, first served, in turns: a piece of the prompts
that wait is computed, and all rows decode a few steps. Turns that only repeat are taken at once.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.cluster.device_model import DeviceModel
from experiments.cluster.workload import Arrival
from jax_chunkattn.replicas.router import Routed
from jax_chunkattn.tree.allocator import PoolExhausted
from jax_chunkattn.tree.kv_events import KVEvents
from jax_chunkattn.tree.nodes import SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree

CALL_TOKENS = 512  # of prompts, in a turn: the engine's default
STEPS = 8  # of decoding, in a turn: the engine's default


@dataclass(eq=False)
class Served:
    """A request at a replica.

    Attributes:
      tokens: int32 [prompt + answer], the answer as it will be.
      found: tokens of the prompt that were there when it came.
      chosen: tokens of the answer that have been.
      stored: of them, those that the tree has; the last one's keys and values come a step later.
      first_token, finished: when; infinite before.
    """

    arrival: Arrival
    routed: Routed
    tokens: np.ndarray
    sequence: SequenceHandle | None = None
    found: int | None = None
    chosen: int = 0
    stored: int = 0
    first_token: float = math.inf
    finished: float = math.inf

    @property
    def history(self) -> np.ndarray:
        return self.tokens[: self.arrival.prompt + self.stored]

    @property
    def left(self) -> int:
        """Steps to its end."""
        return self.arrival.answer - self.chosen

    @property
    def placed(self) -> SequenceHandle:
        assert self.sequence is not None
        return self.sequence


@dataclass
class Turn:
    """What the device is at. Times are when it began, when its prompts are computed, its end.

    Attributes:
      pieces: requests whose prompts are computed, with the token up to which.
      rows: those that decode; each takes `steps`.
      distinct, read: tokens that the rows have before them, stored and attended to.
    """

    began: float
    computed: float
    end: float
    pieces: list[tuple[Served, int]]
    rows: list[Served]
    steps: int
    distinct: int
    read: int

    @property
    def may_be_cut(self) -> bool:
        return not self.pieces


class Replica:
    """One of the fleet.

    Attributes:
      events: what its tree tells the router.
      busy: seconds that its device has worked.
      preemptions: requests that had to give way and were computed again.
    """

    def __init__(self, device: DeviceModel, num_chunks: int, chunk_size: int, max_running: int):
        self.events = KVEvents()
        self.busy = 0.0
        self.preemptions = 0
        self.turn: Turn | None = None
        self._tree = PrefixTree(num_chunks, chunk_size, observers=[self.events])
        self._device = device
        self._max_running = max_running
        self._waiting: deque[Served] = deque()
        self._prompts: list[Served] = []
        self._rows: list[Served] = []

    @property
    def num_evicted(self) -> int:
        return self._tree.num_evicted

    def fits(self, arrival: Arrival) -> bool:
        """Whether the whole pool could hold it to its end."""
        needed = -(-(arrival.prompt + arrival.answer) // self._tree.chunk_size)
        return needed < self._tree.num_chunks

    def submit(self, served: Served, now: float) -> None:
        """Queues a request; rows that decode alone pause for it after the calls that are out."""
        self._waiting.append(served)
        turn = self.turn
        if turn is None:
            self._begin(now)
        elif turn.may_be_cut:
            calls = turn.steps // STEPS
            for done in range(1, calls):
                end = turn.began + self._decoding(turn, done * STEPS)
                if end >= now:
                    turn.steps, turn.end = done * STEPS, end
                    break

    def end_turn(self) -> tuple[list[Served], list[Served]]:
        """Takes over what the turn has computed, and begins the next.

        Returns those that have their first token by it, and those that have ended.
        """
        turn = self.turn
        assert turn is not None
        self.busy += turn.end - turn.began
        began = [served for served, position in turn.pieces if self._computed(served, position)]
        for served in began:
            served.first_token, served.chosen = turn.computed, 1
        for served in turn.rows:
            served.chosen += min(turn.steps, served.left)
        ended = [served for served in self._rows if not served.left]
        for served in ended:
            served.finished = turn.computed if served in began else turn.end
            self._rows.remove(served)
            self._store(served)
            self._tree.release(served.placed)
        for served in list(self._rows):
            full = served.chosen - 1 - served.stored >= self._tree.chunk_size
            while full and served.sequence is not None and not self._store(served):
                self._preempt()
        self._begin(turn.end)
        return began, ended

    def _computed(self, served: Served, position: int) -> bool:
        """Takes over a piece of a prompt; whether its first token comes of it."""
        self._tree.mark_computed(served.placed, position)
        if position < len(served.history):
            return False
        self._prompts.remove(served)
        self._rows.append(served)
        return not served.chosen

    def _begin(self, now: float) -> None:
        """The next turn; none if there is nothing to do."""
        self._admit()
        rows = list(self._rows)
        stored = self._tree.in_use_count * self._tree.chunk_size
        new = sum(one.placed.num_tokens - one.placed.num_cached_tokens for one in self._prompts)
        distinct = max(stored - new, 0) if rows else 0
        read = sum(served.arrival.prompt + served.chosen for served in rows)
        most = min((-(-served.left // STEPS) for served in rows), default=0)
        pieces, seconds, turns = self._pieces(most)
        if not pieces and not rows:
            self.turn = None
            return
        steps = STEPS * (turns if pieces else most) if rows else 0
        self.turn = Turn(now, now + seconds, 0.0, pieces, rows, steps, distinct, read)
        self.turn.end = now + seconds + self._decoding(self.turn, steps)

    def _pieces(self, most_turns: int) -> tuple[list[tuple[Served, int]], float, int]:
        """What is computed next: as many full pieces of the first prompt as there are, and rows let
        it have turns for; or the rest of it, and others beside it. With the time, and the turns."""
        if not self._prompts:
            return [], 0.0, 0
        first = self._prompts[0]
        begin = self._tree.computed_tokens(first.placed)
        full = (len(first.history) - begin - 1) // CALL_TOKENS
        if full > 0:
            turns = min(full, most_turns) if most_turns else full
            tokens = turns * CALL_TOKENS
            return [(first, begin + tokens)], self._device.prefill(begin, tokens, turns), turns
        pieces, room, seconds = [], CALL_TOKENS, 0.0
        for served in self._prompts:
            begin, end = self._tree.computed_tokens(served.placed), len(served.history)
            if pieces and begin < served.placed.num_cached_tokens:
                break  # one before it is computing what they have in common
            tokens = min(max(end - begin, 1), room)  # the last token's logits are always needed
            pieces.append((served, min(begin + tokens, end)))
            seconds += self._device.prefill(begin, tokens, 0)
            room -= tokens
            if not room:
                break
        return pieces, seconds + self._device.prefill(0, 0, 1), 1

    def _decoding(self, turn: Turn, steps: int) -> float:
        if not steps:
            return 0.0
        return self._device.decode(len(turn.rows), turn.distinct, turn.read, steps)

    def _admit(self) -> None:
        while self._waiting and len(self._prompts) + len(self._rows) < self._max_running:
            served = self._waiting[0]
            growing = len(self._rows) + len(self._prompts) + 1
            if self._tree.room_after_insert(served.history) < growing:
                return
            self._waiting.popleft()
            served.sequence = self._tree.insert(served.history, copy_partial=True)
            if served.found is None:
                there = served.sequence.num_cached_tokens
                served.found = min(there, served.arrival.prompt - 1)
            self._prompts.append(served)

    def _store(self, served: Served) -> bool:
        """The tree learns of tokens that have been chosen, but for the last; False if the pool has
        no room for them."""
        count = served.chosen - 1 - served.stored
        if not count:
            return True
        try:
            self._tree.reserve(served.placed, count)
        except PoolExhausted:
            return False
        begin = served.arrival.prompt + served.stored
        self._tree.append(served.placed, served.tokens[begin : begin + count])
        served.stored += count
        return True

    def _preempt(self) -> None:
        """The youngest goes back to the queue; what it has chosen is computed again."""
        youngest = max([*self._prompts, *self._rows], key=_due)
        (self._prompts if youngest in self._prompts else self._rows).remove(youngest)
        self._tree.release(youngest.placed)
        youngest.sequence = None
        youngest.stored = max(youngest.chosen - 1, 0)
        self._waiting.appendleft(youngest)
        self.preemptions += 1


def _due(served: Served) -> Any:
    return served.arrival.due
