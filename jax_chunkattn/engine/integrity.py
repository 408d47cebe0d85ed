"""Changes that are made as a whole, or known to have been broken off."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


class Integrity:
    """Of one engine's state.

    Attributes:
      torn: a change was broken off; before the next, what it has left must be put right.
    """

    def __init__(self) -> None:
        self.torn = False


class HasIntegrity(Protocol):
    integrity: Integrity


Owner = TypeVar("Owner", bound=HasIntegrity)


def whole(
    change: Callable[Concatenate[Owner, Params], Result],
) -> Callable[Concatenate[Owner, Params], Result]:
    """A change that Ctrl-C, or what else a signal's handler raises, may break off anywhere.

    The owner's `integrity` is `torn` then. Ordinary errors the change sees to itself.
    """

    @wraps(change)
    def made_whole(owner: Owner, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        try:
            return change(owner, *args, **kwargs)
        except Exception:
            raise
        except BaseException:
            owner.integrity.torn = True
            raise

    return made_whole
