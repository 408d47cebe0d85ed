"""The units of operations whose cost can exceed the weight of their arguments.

Functions of the arguments: for operators, and in tables for methods, filters and tests, by name.
Where the exact cost is hard to know they overestimate it, and they never underestimate it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from models.template_limits.budget import ITEM, breadth, extent, made_units, pay, refuse_bits, weigh

Growth = Callable[..., int]

COMPARED = 64  # characters that are compared for a unit
INDENTED = "\t\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
"""Characters that are replaced by a width of spaces, or that end a line to be indented."""
PLAIN_CODINGS = {"utf-8", "utf8", "ascii", "latin-1", "strict", "ignore", "replace"}
"""Codings, and ways to treat errors, that take about as many bytes and steps as characters."""


def operator_units(operator: str, left: Any, right: Any) -> int:
    """Refuses integers that are too long to compute with."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length(), right.bit_length()
        refuse_bits(max(bits))
        refuse_bits({"*": sum(bits), "**": bits[0] * abs(right)}.get(operator, 0))
        return ITEM
    if operator == "%":
        return _percent(left, right)
    if operator == "-":  # of the keys of mappings
        return pay(left) + pay(right)
    if operator == "*" and isinstance(left, int):
        left, right = right, left
    times = right if operator == "*" and isinstance(right, int) else 1
    return ITEM + times * made_units(left) + made_units(right)


def numbers(text: str) -> int:
    """All numbers in a text; Python itself refuses those of thousands of digits."""
    return sum(map(int, re.findall(r"\d+", text)))


def _percent(form: Any, values: Any = ()) -> int:
    """Of `form % values`, whatever `form` is: each value may stand at each sign."""
    weight = pay(form) + pay(values)
    text = repr(form)
    if "%" not in text:
        return 0
    stars = extent(values) if "*" in text else 0
    return numbers(text) + text.count("%") * (stars + weight)


def _declared(_: Any, /, *given: Any, **named: Any) -> int:
    return ITEM * extent(given, named.values())


def _indented(text: Any, /, *given: Any, **named: Any) -> int:
    places = sum(map(text.count, INDENTED)) + 1 if isinstance(text, str) else breadth(text)
    return places * (8 + extent(given, named.values()))


def _replaced(text: Any, old: Any = "", new: Any = "", /, *_: Any, **named: Any) -> int:
    old, new = named.get("old", old), named.get("new", new)
    found = text.count(old) if type(text) is type(old) is str else breadth(text) + 1
    return found * breadth(new)


def _split(text: Any, part: Any = None, /, *_: Any, **named: Any) -> int:
    part = named.get("sep", part)
    return ITEM * (text.count(part) if part else len(text) // 2)


def _words(value: Any, /, *_: Any, **__: Any) -> int:
    return ITEM * pay(value)


def _coded(text: Any, /, *given: Any, **named: Any) -> int:
    is_plain = {*given, *named.values()} <= PLAIN_CODINGS
    return 0 if is_plain else len(text) ** 2  # which punycode takes


def _squared(value: Any, /, *given: Any, **named: Any) -> int:
    return (pay(value) + pay(given) + pay(named)) ** 2 // COMPARED


def _json(value: Any, /, *given: Any, **named: Any) -> int:
    weight, depth = weigh(value)
    return weight // ITEM * depth * extent(given, named.values())


def _summed(values: Any, attribute: Any = None, start: Any = 0) -> int:
    return 0 if isinstance(start, int | float) else breadth(values) * pay(values)


METHODS: dict[str, Growth] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "to_bytes"), _declared),
    "expandtabs": _indented,
    "replace": _replaced,
    "join": lambda between, values=(): breadth(values) * len(between),
    "translate": lambda text, *table: len(text) * pay(table),
    **dict.fromkeys(("split", "rsplit"), _split),
    "splitlines": _words,
    **dict.fromkeys(("encode", "decode"), _coded),
    "striptags": _squared,
}
"""Of text, bytes and integers."""

FILTERS: dict[str, Growth] = {
    **dict.fromkeys(("batch", "center", "slice"), _declared),
    "format": lambda form, /, *values, **named: _percent(form, named or values),
    "indent": _indented,
    "replace": _replaced,
    "round": lambda _, /, *given, **named: extent(given, named.values()) ** 2,
    "sum": _summed,
    **dict.fromkeys(("title", "wordcount"), _words),
    "tojson": _json,
    **dict.fromkeys(("pprint", "striptags", "urlize", "wordwrap", "xmlattr"), _squared),
}

TESTS: dict[str, Growth] = dict.fromkeys(("odd", "even", "divisibleby"), _percent)
"""They compute `value % number`, also of a text."""
