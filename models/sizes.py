"""Which numbers of a checkpoint's metadata are valid.

JSON has integers of any length, infinity and NaN; GGUF has 64 bits. A size must be at most
2**31 - 1, since JAX indexes in int32, and other numbers must fit float32.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, TypeGuard

MOST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000  # a corrupt number would exhaust memory before missing tensors are noticed
MOST_HEADS = MOST_HEAD_DIM = 2**16
MOST_PARAMETERS = 2**43
LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127  # of float32
MOST_SHOWN = 80


def is_size(value: Any, least: int = 1, most: int = MOST_SIZE) -> TypeGuard[int]:
    """Whether it is an integer from `least` to `most`, and no bool."""
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> TypeGuard[int | float | Fraction]:
    """Whether it is a number that a float32 can be, and no bool."""
    is_one = isinstance(value, int | float | Fraction) and not isinstance(value, bool)
    return is_one and -LARGEST_FLOAT <= value <= LARGEST_FLOAT


def is_positive(value: Any) -> TypeGuard[int | float | Fraction]:
    """Whether it is a number over 0."""
    return is_number(value) and value > 0


def shown(value: Any) -> str:
    """The value as text for a message, cut to `MOST_SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def size_error(name: str, value: Any, least: int = 1, most: int = MOST_SIZE) -> str:
    """The message for a value that is not such a size."""
    return f"{name} is {shown(value)}; expected an integer from {least:,} to {most:,}"
