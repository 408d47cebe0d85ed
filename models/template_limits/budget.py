"""What a render may still take, and what values weigh.

A character is a unit, and an item of a list or a mapping `ITEM` of them. A value that occurs in
another several times is weighed as often: of a list that holds a list twice, that holds a list
twice, and so on, no text of a gigabyte is made.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from jinja2.utils import Namespace

BASE_UNITS = 20_000_000
UNITS_PER_UNIT = 40
"""A render may take the first, and this many for each unit that the messages weigh; templates of
published models take 3 to 5."""

ITEM = 10
MOST_BITS = 4096  # of an integer that a template makes
MOST_NESTED = 500  # values in one another; hash() of a deeper tuple runs out of the C stack


class Budget:
    """What a render may still take."""

    def __init__(self, units: int):
        self.units = self.left = units

    def charge(self, units: int) -> None:
        self.left -= max(units, 0)
        if self.left < 0:
            raise ValueError(f"it takes more than {self.units:,} steps and characters")


_BUDGET: ContextVar[Budget] = ContextVar("budget of the template that is rendered")


@contextlib.contextmanager
def limited(given: Any) -> Iterator[None]:
    """Templates of a `LimitedEnvironment` are compiled and rendered in here, with what is given."""
    weight, _ = weigh(given)
    token = _BUDGET.set(Budget(BASE_UNITS + UNITS_PER_UNIT * weight))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def charge(units: int) -> None:
    _BUDGET.get().charge(units)


def pay(value: Any) -> int:
    """Pays for a value with all that is in it, and says what that was."""
    budget = _BUDGET.get()
    weight = ITEM + len(value) if type(value) is str else weigh(value, budget.left)[0]
    budget.charge(weight)
    return weight


def pay_made(value: Any) -> Any:
    """The value, which has just been made of others: pays for it, but not for those."""
    if type(value) is int:
        refuse_bits(value.bit_length())
    charge(made_units(value))
    return value


def refuse_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise ValueError(f"it makes an integer of more than {MOST_BITS:,} bits")


def breadth(value: Any) -> int:
    """How many characters or items a value has; 0 where it cannot be told."""
    return len(value) if isinstance(value, Collection) else 0


def made_units(value: Any) -> int:
    return breadth(value) * (1 if isinstance(value, str | bytes) else ITEM)


def weigh(value: Any, most: float = math.inf) -> tuple[int, int]:
    """Units of a value with all that is in it, and how many are in one another.

    Stops as soon as there are more than `most`.
    """
    total, depth, level = 0, 0, [value]
    while level:
        depth += 1
        below: list[Any] = []
        for each in level:
            total += ITEM
            if isinstance(each, str | bytes):
                total += len(each)
            elif isinstance(each, int):
                total += each.bit_length() >> 3
            elif items := _inside(each):
                if (least := total + ITEM * (len(below) + len(items))) > most:
                    return least, depth
                below += items
        if total > most:
            break
        if depth > MOST_NESTED and below:
            raise ValueError(f"it nests values more than {MOST_NESTED} deep")
        level = below
    return total, depth


def extent(*given: Any) -> int:
    """All integers in what is given, which may be widths, and the lengths of all texts."""
    total = 0
    for each in given:
        if isinstance(each, int):
            total += abs(each)
        else:
            total += len(each) if isinstance(each, str | bytes) else extent(*_inside(each))
    return total


def _inside(value: Any) -> Collection[Any]:
    """The items of a value, and the keys of a mapping."""
    if isinstance(value, Namespace):  # which shows only what a template put there
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, Collection) else ()
