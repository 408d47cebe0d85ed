"""The budget of a render in units, and the weight of values.

A character weighs one unit, and an item of a list or a mapping `ITEM` units. A value that occurs
several times within another is counted each time, so that a list that holds a list twice, which
holds a list twice, and so on, cannot become a text of a gigabyte.
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
"""The budget is `BASE_UNITS`, and this many for each unit that the messages weigh; templates of
published models need 3 to 5."""

ITEM = 10
MOST_BITS = 4096  # of an integer that a template makes
MOST_NESTED = 500  # values in one another; hash() of a deeper tuple runs out of the C stack


class Budget:
    """The units that a render has left."""

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
    """Charges for a value with everything in it, and returns the units charged."""
    budget = _BUDGET.get()
    weight = ITEM + len(value) if type(value) is str else weigh(value, budget.left)[0]
    budget.charge(weight)
    return weight


def pay_made(value: Any) -> Any:
    """The value, just made from others: charges for it, but not for the values in it."""
    if type(value) is int:
        refuse_bits(value.bit_length())
    charge(made_units(value))
    return value


def refuse_bits(bits: int) -> None:
    if bits > MOST_BITS:
        raise ValueError(f"it makes an integer of more than {MOST_BITS:,} bits")


def breadth(value: Any) -> int:
    """How many characters or items a value has; 0 where that is unknown."""
    return len(value) if isinstance(value, Collection) else 0


def made_units(value: Any) -> int:
    return breadth(value) * (1 if isinstance(value, str | bytes) else ITEM)


def weigh(value: Any, most: float = math.inf) -> tuple[int, int]:
    """The units of a value with everything in it, and the depth of its nesting.

    Stops as soon as there are more than `most` units.
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
    """The sum of all integers in the arguments, which may be widths, and of all texts' lengths."""
    total = 0
    for each in given:
        if isinstance(each, int):
            total += abs(each)
        else:
            total += len(each) if isinstance(each, str | bytes) else extent(*_inside(each))
    return total


def _inside(value: Any) -> Collection[Any]:
    """The items of a value, and the keys of a mapping."""
    if isinstance(value, Namespace):  # it shows only what a template put there
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    return value if isinstance(value, Collection) else ()
