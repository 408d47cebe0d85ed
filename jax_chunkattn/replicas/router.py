"""Sends requests to replicas, each an engine with a pool and a prefix tree of its own."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from jax_chunkattn.replicas.policies import Candidates, LongestMatch, Policy
from jax_chunkattn.replicas.prefix_map import PrefixMap
from jax_chunkattn.tree.kv_events import BlockStored, KVEvent, hash_chunks


class NoReplica(RuntimeError):
    """There is no replica that a request could go to."""


@dataclass(frozen=True)
class OverloadRule:
    """A replica is overloaded that has more work than `factor` times the mean, and `slack` beside.

    Work is counted in tokens of prompts that are still to be computed; a request that has been
    routed and has not ended counts as `row_tokens` beside its prompt. Less slack finds less and has
    the first token sooner: with 1,000 replicas, 2,048 tokens find 73% of all prompts', 8,192 find
    77%, and nine of ten requests have their first token after 5.5 or 14 seconds.
    """

    factor: float = 1.5
    slack: float = 2048.0
    row_tokens: float = 256.0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.slack < 0 or self.row_tokens < 0:
            raise ValueError(f"factor must be at least 1, the others at least 0: {self}")


@dataclass
class RouterStats:
    """What a router has done.

    Attributes:
      requests: routed, those routed again included.
      matched: went to a replica that held as much of the prompt as any, and something of it.
      overloaded: a replica that held more of the prompt was overloaded, and another got it.
      passed_by: a replica that held more was not overloaded: the policy would have it so.
      unmatched: no replica held anything of the prompt.
      sticky: went where their session had been before.
      rerouted: were on their way to a replica that was lost.
      prompt_tokens, predicted_tokens: of all, and of those what the map said was there.
      found_tokens, judged_tokens: what replicas said they found, and of how many.
      lost: replicas.
      stored, removed, cleared: chunks that events told of, and how often all of a replica's.
      by_replica: requests, by name.
      map_chunks, forgotten: chunks in the map, and those that had to make room.
    """

    requests: int = 0
    matched: int = 0
    overloaded: int = 0
    passed_by: int = 0
    unmatched: int = 0
    sticky: int = 0
    rerouted: int = 0
    prompt_tokens: int = 0
    predicted_tokens: int = 0
    found_tokens: int = 0
    judged_tokens: int = 0
    lost: int = 0
    stored: int = 0
    removed: int = 0
    cleared: int = 0
    by_replica: dict[str, int] = field(default_factory=dict)
    map_chunks: int = 0
    forgotten: int = 0


@dataclass(eq=False)
class Routed:
    """A request on its way.

    Attributes:
      replica: where it goes.
      num_tokens, found_tokens: of the prompt, and what of it the replica holds as far as is known.
      hashes: of the prompt's whole chunks.
      place, load, waiting: the router's own: which bit the replica has, what the request adds to
        its work, and what of that ends with the first token.
    """

    replica: str
    num_tokens: int
    found_tokens: int
    hashes: list[int]
    place: int = field(repr=False)
    load: float = field(repr=False)
    waiting: float = field(repr=False)


class Router:
    """Chooses a replica for each request, and remembers which prefixes each of them holds.

    Life of a request: `route` it, send it to that replica, say `began` with its first token, and
    `finish` when it has ended in any way. What a replica's engine tells (`KVEvents.take`) goes to
    `apply`; without events, a replica is taken to hold the prompts that it has finished.

    May be used from many threads.

    Args:
      policy: see `replicas.policies`.
      chunk_size: tokens of a chunk, C, as the replicas have it.
      events: whether there will be events.
      overload: which replicas get no more than they have.
      max_chunks: most chunks of the map; about 0.3 KB each.
      max_sessions: sessions remembered, those used last.
      seed: of what is left to chance.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        chunk_size: int = 64,
        events: bool = True,
        overload: OverloadRule = OverloadRule(),
        max_chunks: int = 1 << 20,
        max_sessions: int = 1 << 16,
        seed: int = 0,
    ):
        """Raises ValueError when a size is below 1."""
        if chunk_size < 1 or max_sessions < 1:
            raise ValueError(
                f"chunk_size and max_sessions must be at least 1, got {chunk_size}, {max_sessions}"
            )
        self.policy: Policy = policy or LongestMatch()
        self.chunk_size = chunk_size
        self.overload = overload
        self._events = events
        self._map = PrefixMap(max_chunks)
        self._random = np.random.default_rng(seed)
        self._max_sessions = max_sessions
        self._sessions: OrderedDict[str, str] = OrderedDict()
        self._places: dict[str, int] = {}
        self._names: list[str] = []  # of all places, those that nobody has any longer too
        self._loads = np.full(0, np.inf)
        self._keys = np.zeros(0, np.uint64)
        self._on_their_way: dict[Routed, None] = {}
        self._stats = RouterStats()
        self._lock = threading.RLock()  # a finaliser may interrupt one who has it

    # Replicas.

    @property
    def replicas(self) -> list[str]:
        """Those that requests may go to."""
        return list(self._places)

    def add(self, replica: str) -> None:
        """A replica that holds nothing yet. Raises ValueError when one of its name is there."""
        with self._lock:
            if replica in self._places:
                raise ValueError(f"there is a replica {replica!r} already")
            empty = np.flatnonzero(np.isinf(self._loads))
            place = int(empty[0]) if len(empty) else len(self._loads)
            if place == len(self._loads):
                self._loads = np.append(self._loads, 0.0)
                self._keys = np.append(self._keys, np.uint64(0))
                self._names.append(replica)
            self._loads[place] = 0.0
            self._keys[place] = _key(replica)
            self._places[replica], self._names[place] = place, replica

    def lose(self, replica: str) -> list[Routed]:
        """A replica is gone, with all it held; the requests that were on their way, to be routed
        again. Costs a pass over the map. Raises ValueError when there is none of that name."""
        with self._lock:
            place = self._place(replica)
            gone = [one for one in self._on_their_way if one.replica == replica]
            for one in gone:
                self._leave(one)
            self._map.clear(place)
            self._loads[place] = np.inf
            del self._places[replica]
            self._stats.lost += 1
            self._stats.rerouted += len(gone)
            return gone

    def apply(self, replica: str, events: Iterable[KVEvent]) -> None:
        """Takes over what a replica's cache has gained and lost.

        Raises ValueError when there is none of that name, or its chunks have another size.
        """
        with self._lock:
            place, events = self._place(replica), list(events)
            for event in events:
                if isinstance(event, BlockStored) and event.block_size != self.chunk_size:
                    raise ValueError(
                        f"{replica!r} has chunks of {event.block_size} tokens, the router of "
                        f"{self.chunk_size}"
                    )
            self._map.apply(place, events)
            for event in events:
                hashes = getattr(event, "block_hashes", None)
                if hashes is None:
                    self._stats.cleared += 1
                elif isinstance(event, BlockStored):
                    self._stats.stored += len(hashes)
                else:
                    self._stats.removed += len(hashes)

    # Requests.

    def route(
        self,
        tokens: Iterable[int] | np.ndarray,
        *,
        salt: bytes = b"",
        session: str | None = None,
    ) -> Routed:
        """Where a prompt is to go.

        Requests of a `session` go where the last one went, unless that replica is lost or
        overloaded.

        Raises:
          NoReplica: there is none.
          ValueError: bad tokens.
        """
        tokens = tokens if isinstance(tokens, np.ndarray) else tuple(tokens)
        hashes, num_tokens = hash_chunks(tokens, self.chunk_size, salt), len(tokens)
        with self._lock:
            if not self._places:
                raise NoReplica("there is no replica; add one")
            found = self._map.lookup(hashes, len(self._loads)) * self.chunk_size
            candidates = Candidates(
                hashes,
                num_tokens,
                self.chunk_size,
                found,
                self._loads,
                self._overloaded(),
                self._keys,
                self._random,
            )
            place = self._place_of_session(session, candidates)
            if place is None:
                place = self.policy.choose(candidates)
            return self._send(place, candidates, session)

    def began(self, routed: Routed, found_tokens: int | None = None) -> None:
        """A request's first token is there: its prompt is computed. `found_tokens` is what the
        replica says it did not have to compute."""
        with self._lock:
            if routed in self._on_their_way:
                self._loads[routed.place] -= routed.waiting
                routed.load -= routed.waiting
                routed.waiting = 0.0
            if found_tokens is not None:
                self._stats.found_tokens += found_tokens
                self._stats.judged_tokens += routed.num_tokens

    def finish(self, routed: Routed) -> None:
        """A request has ended. Harmless when it had before, or its replica is lost."""
        with self._lock:
            if routed in self._on_their_way:
                self._leave(routed)
                if not self._events:
                    self._map.hold(routed.place, routed.hashes)

    @property
    def stats(self) -> RouterStats:
        """A copy of the counters."""
        with self._lock:
            return replace(
                self._stats,
                by_replica=dict(self._stats.by_replica),
                map_chunks=len(self._map),
                forgotten=self._map.forgotten,
            )

    @property
    def loads(self) -> dict[str, float]:
        """The work that each replica has, in tokens of prompts."""
        with self._lock:
            return {replica: float(self._loads[place]) for replica, place in self._places.items()}

    # Inside.

    def _place(self, replica: str) -> int:
        if replica not in self._places:
            raise ValueError(f"there is no replica {replica!r}")
        return self._places[replica]

    def _overloaded(self) -> np.ndarray:
        """Bool [R]."""
        there = np.isfinite(self._loads)
        mean = self._loads[there].sum() / len(self._places)
        return self._loads > self.overload.factor * mean + self.overload.slack

    def _place_of_session(self, session: str | None, candidates: Candidates) -> int | None:
        if session is None or session not in self._sessions:
            return None
        place = self._places.get(self._sessions[session])
        if place is None or candidates.overloaded[place]:
            return None
        self._stats.sticky += 1
        return place

    def _send(self, place: int, candidates: Candidates, session: str | None) -> Routed:
        found = int(candidates.found[place])
        self._count(place, candidates)
        replica, waiting = self._names[place], float(candidates.num_tokens - found)
        load = waiting + self.overload.row_tokens
        hashes = list(candidates.hashes)
        routed = Routed(replica, candidates.num_tokens, found, hashes, place, load, waiting)
        self._loads[place] += load
        self._map.expect(place, routed.hashes)
        self._on_their_way[routed] = None
        if session is not None:
            self._sessions[session] = replica
            self._sessions.move_to_end(session)
            while len(self._sessions) > self._max_sessions:
                self._sessions.popitem(last=False)
        stats = self._stats
        stats.by_replica[replica] = stats.by_replica.get(replica, 0) + 1
        return routed

    def _count(self, place: int, candidates: Candidates) -> None:
        stats, found = self._stats, candidates.found
        stats.requests += 1
        stats.prompt_tokens += candidates.num_tokens
        stats.predicted_tokens += int(found[place])
        most = found.max()
        if not most:
            stats.unmatched += 1
        elif found[place] == most:
            stats.matched += 1
        elif candidates.overloaded[found == most].all():
            stats.overloaded += 1
        else:
            stats.passed_by += 1

    def _leave(self, routed: Routed) -> None:
        """It is not on its way any longer."""
        del self._on_their_way[routed]
        self._loads[routed.place] -= routed.load
        self._map.arrived(routed.place, routed.hashes)


def _key(replica: str) -> np.uint64:
    """A number that a name has in every router."""
    digest = hashlib.blake2b(replica.encode(), digest_size=8).digest()
    return np.frombuffer(digest, np.uint64)[0]
