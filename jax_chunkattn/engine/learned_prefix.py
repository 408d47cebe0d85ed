"""What a caller holds of a learned prefix."""

from __future__ import annotations

from jax_chunkattn.engine.requests import Pinned
from jax_chunkattn.engine.service import Service


class LearnedPrefix:
    """Virtual tokens that requests may come behind; see `Engine.add_prefix`."""

    def __init__(self, service: Service, learned: Pinned):
        assert learned.virtual is not None, "it is a learned one"
        self._service = service
        self._learned = learned
        self._virtual = learned.virtual

    def __repr__(self) -> str:
        return f"<LearnedPrefix {self.name!r}: {self.num_tokens} virtual tokens>"

    @property
    def name(self) -> str:
        """By which requests ask for it."""
        return self._virtual.name

    @property
    def num_tokens(self) -> int:
        """Virtual tokens, those of the prefix that it comes behind among them."""
        return len(self._virtual.ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What stands for them in events of the cache, the same in all processes: ids that no
        vocabulary has. A router that is asked for these and the prompt finds who has both."""
        return self._virtual.ids

    @property
    def written(self) -> bool:
        """Whether all of it is in the pool."""
        return self._service.is_computed(self._learned)

    def release(self) -> None:
        """Frees the name, and lets the chunks be evicted like others.

        Requests that have asked for it go on, as prefixes do that come behind it. Harmless when it
        was released before.
        """
        self._service.release_prefix(self._learned)
