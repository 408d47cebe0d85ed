"""Where chunks are: the seam between an engine and what may be behind its pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jax_chunkattn.tiers.store import Tier
from jax_chunkattn.tree.kv_events import ChunkObserver
from jax_chunkattn.tree.nodes import Node, SequenceHandle
from jax_chunkattn.tree.prefix_tree import PrefixTree


@dataclass
class TierStats:
    """Chunks behind the pool. Tokens are counted in whole chunks.

    Attributes:
      host_chunks, disk_chunks: there now, as far as is known.
      kept_in_host, kept_on_disk: chunks that have come to memory, and to the disk.
      loaded_from_host, loaded_from_disk: tokens that were brought back instead of computed.
      computed_instead: tokens that were there, and were computed because that takes less time.
      not_written: chunks that the disk could not keep up with.
      failures: chunks that could not be moved, by reason.
      load_seconds: of a chunk, by tier, lately; `compute_seconds` if its tokens are computed.
        They are 0 before anything was measured.
    """

    host_chunks: int = 0
    disk_chunks: int = 0
    kept_in_host: int = 0
    kept_on_disk: int = 0
    loaded_from_host: int = 0
    loaded_from_disk: int = 0
    computed_instead: int = 0
    not_written: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    compute_seconds: float = 0.0


class TierError(ValueError):
    """Tiers that cannot be behind an engine's pool; the message says why."""


class Residency:
    """In the pool alone: what is evicted is computed again.

    Attributes:
      moves: whether chunks leave the pool and come back.
    """

    moves = False

    @property
    def observers(self) -> Sequence[ChunkObserver]:
        """Those to be told of what the tree holds."""
        return ()

    @property
    def stats(self) -> TierStats | None:
        """What has been moved; None where nothing ever is."""
        return None

    # Into the pool.

    def fetch(self, sequence: SequenceHandle) -> Mapping[Tier, int]:
        """Has the chunks behind what is computed of a new sequence brought back, where they are
        kept and that takes less time than computing them; returns how many, by where they are."""
        return {}

    def is_coming(self, node: Node) -> bool:
        """Whether a node's chunk is on its way, so that nobody need compute it."""
        return False

    def collect(self, tree: PrefixTree) -> None:
        """Puts into the pool what has come, in its order. What could not be had, and what stands
        behind it, is to be computed."""

    def wait(self) -> bool:
        """Waits a little for what comes next; False when nothing does."""
        return False

    # Out of the pool.

    def save(self) -> None:
        """Has chunks that leave read before the pool is next written."""

    def leave(self, tree: PrefixTree) -> None:
        """Has all that is computed leave a pool that will be another, and waits until it has."""

    # The end, and new beginnings.

    def start_over(self) -> None:
        """The pool is lost: nothing leaves it, and nothing is awaited."""

    def rename(self) -> None:
        """Other weights are served: nothing that was kept is found by them."""

    def forget(self) -> None:
        """Nothing that is kept now will be found again; what is on its way comes."""

    def close(self) -> None:
        """Writes what waits to be written; nothing is observed any longer."""
