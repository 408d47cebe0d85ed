"""Who was forked from whom, kept for no longer than somebody can ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar
from weakref import ref


class HasLineage(Protocol):
    lineage: Lineage


Owner = TypeVar("Owner", bound=HasLineage)


class Lineage:
    """One request's place among forks of forks.

    It refers to its parent's, and no parent to its forks: a request that has ended and that nobody
    has a handle of is free to go, whatever was forked from it. The lineage that it leaves is passed
    over by forks to come, so that forking the last fork again and again takes no more memory.
    """

    __slots__ = ("_owner", "_parent")

    def __init__(self, owner: HasLineage):
        self._owner = ref(owner)
        self._parent: Lineage | None = None

    def fork_from(self, parent: Lineage) -> None:
        """Its owner was forked from the owner of `parent`."""
        while parent._parent is not None and parent._parent._owner() is None:
            parent._parent = parent._parent._parent
        self._parent = parent

    def family(self, some: Iterable[Owner]) -> list[Owner]:
        """Those who are its owner, or forks of it, or forks of forks; in the order given.

        Each lineage is looked at once, however deep it is and however many share it.
        """
        inside: dict[Lineage | None, bool] = {self: True, None: False}

        def belongs(lineage: Lineage | None) -> bool:
            path = []
            while lineage not in inside:
                path.append(lineage)
                lineage = lineage._parent if lineage is not None else None
            inside.update(dict.fromkeys(path, inside[lineage]))
            return inside[lineage]

        return [one for one in some if belongs(one.lineage)]
