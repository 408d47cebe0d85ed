"""How the tests check the types of arguments and results, and of the fields of dataclasses."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import beartype

# An int will do for a float, as for static type checkers (PEP 484).
_checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def typechecker(function: Callable[..., Any]) -> Callable[..., Any]:
    """Beartype, but not where JAX rebuilds a dataclass: its annotations are what a caller must
    give, and JAX puts shapes, shardings and placeholders in the place of arrays."""
    check = _checked(function)
    if function.__name__ != "__init__":
        return check

    @functools.wraps(function)
    def check_unless_rebuilt(*args, **kwargs):
        frame = sys._getframe(1)
        while frame.f_back and _package(frame) == "jaxtyping":
            frame = frame.f_back
        return None if _package(frame) == "jax" else check(*args, **kwargs)

    return check_unless_rebuilt


def _package(frame: FrameType) -> str:
    """The top package of the code that runs there; empty for code of no module."""
    return frame.f_globals.get("__name__", "").partition(".")[0]
