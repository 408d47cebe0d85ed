"""Which replica a request goes to: policies behind one interface.

All of them see the same: how much of the prompt each replica holds, how much work it has, and which
of them have too much. Letters: R places for replicas; where there is none its load is infinite, and
it counts as overloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Candidates:
    """What is known when a request comes.

    Attributes:
      hashes: of the whole chunks of its prompt; num_tokens are the prompt's.
      chunk_size: tokens of a chunk, C.
      found: tokens of the prompt that each replica holds, or is expected to: int64 [R].
      loads: work that each has, in tokens of prompts: float64 [R].
      overloaded: bool [R]; never all of those there are.
      keys: of each replica a number by its name: uint64 [R].
      random: where chance comes from.
    """

    hashes: Sequence[int]
    num_tokens: int
    chunk_size: int
    found: np.ndarray
    loads: np.ndarray
    overloaded: np.ndarray
    keys: np.ndarray
    random: np.random.Generator

    def least_loaded(self) -> int:
        """The replica with the least work; one of several by chance."""
        return self.one_of(self.loads == self.loads.min())

    def one_of(self, chosen: np.ndarray) -> int:
        """One of those for which a bool [R] holds, by chance."""
        places = np.flatnonzero(chosen)
        return int(places[self.random.integers(len(places))] if len(places) > 1 else places[0])


class Policy(Protocol):
    """Chooses a replica. It may keep to itself what it likes, but not change what it is shown."""

    name: str

    def choose(self, candidates: Candidates) -> int:
        """The place of the replica that the request goes to."""
        ...


class Random:
    """Any replica, by chance."""

    name = "random"

    def choose(self, candidates: Candidates) -> int:
        return candidates.one_of(np.isfinite(candidates.loads))


class LeastLoaded:
    """The replica with the least work, wherever prefixes are."""

    name = "least-loaded"

    def choose(self, candidates: Candidates) -> int:
        return candidates.least_loaded()


class PrefixHash:
    """The same replica for all prompts that begin alike, by a hash of their first chunks.

    Needs no map. By rendezvous hashing (Thaler and Ravishankar, 1998) a replica that comes or goes
    moves no more than its share of prompts; with bounded loads (Mirrokni et al., SODA 2018) the
    next in a prompt's order takes it while the first is overloaded.

    Args:
      tokens: how many of a prompt's first count. Prompts that all begin with one system prompt need
        more than it has.
    """

    name = "prefix-hash"

    def __init__(self, tokens: int = 1024):
        """Raises ValueError when `tokens` is below 1."""
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        self.tokens = tokens

    def choose(self, candidates: Candidates) -> int:
        hashes = candidates.hashes
        if not hashes:
            return candidates.least_loaded()
        last = min(-(-self.tokens // candidates.chunk_size), len(hashes)) - 1
        weights = _mixed(candidates.keys ^ np.uint64(hashes[last]))
        weights[candidates.overloaded] = 0
        return int(weights.argmax())


class LongestMatch:
    """The replica that holds most of the prompt, among those that are not overloaded.

    Args:
      least_share: of a prompt that a replica must hold; if none does, the least loaded takes it.
        What all prompts begin with would else gather them where the first one went.
    """

    name = "longest-match"

    def __init__(self, least_share: float = 0.1):
        """Raises ValueError unless `least_share` is in [0, 1]."""
        if not 0 <= least_share <= 1:
            raise ValueError(f"least_share must be in [0, 1], got {least_share}")
        self.least_share = least_share

    def choose(self, candidates: Candidates) -> int:
        found = np.where(candidates.overloaded, -1, candidates.found)
        most = found.max()
        if most <= 0 or most < self.least_share * candidates.num_tokens:
            return candidates.least_loaded()
        loads = np.where(found == most, candidates.loads, np.inf)
        return candidates.one_of(loads == loads.min())


class LeastWork:
    """The replica that would have the least to compute with the request: what waits there, and
    what it does not hold of the prompt. NVIDIA Dynamo's KV router weighs the two like this."""

    name = "least-work"

    def choose(self, candidates: Candidates) -> int:
        work = candidates.loads - candidates.found
        return candidates.one_of(work == work.min())


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each number scattered over 64 bits, by SplitMix64's finaliser (Steele et al., 2014)."""
    mixed = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


POLICIES = {one.name: one for one in (Random, LeastLoaded, PrefixHash, LongestMatch, LeastWork)}
"""Classes by name; each can be made without arguments."""
