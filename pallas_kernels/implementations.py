"""Which implementation of an operation runs."""

from __future__ import annotations

from collections.abc import Collection

DEFAULT = "xla"


def resolve(implementation: str | None, known: Collection[str]) -> str:
    """The name to run: the one asked for, or the best on this machine for None.

    Raises:
      ValueError: for a name that is not among the known ones; nothing is ever substituted.
    """
    if implementation is None:
        return DEFAULT
    if implementation not in known:
        raise ValueError(
            f"unknown implementation {implementation!r}; known: {', '.join(sorted(known))}"
        )
    return implementation
