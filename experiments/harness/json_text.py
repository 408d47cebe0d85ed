"""JSON as every file and `--json` has it: strict, as RFC 8259 has it, in valid UTF-8.

Python would write NaN and infinities bare, which few other readers take. A number that is not
finite stands as an object that names it: `{"number": "NaN"}`, `{"number": "Infinity"}` or
`{"number": "-Infinity"}`. A mere text could be an answer, and null would tell that nothing was
measured. Half a surrogate pair, which UTF-8 has no bytes for, is escaped.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

_NAME = "number"
_VALUES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_SURROGATE = re.compile("[\ud800-\udfff]")


def to_json(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """The text of a value of dicts with text keys, lists, texts, numbers, booleans and None."""
    how: dict[str, Any] = {"indent": indent, "ensure_ascii": ascii_only, "allow_nan": False}
    try:
        text = json.dumps(value, **how)
    except ValueError:
        text = json.dumps(_named(value), **how)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def is_half_a_pair(text: str) -> bool:
    """Whether a text has half a surrogate pair, which makes it no text."""
    return _SURROGATE.search(text) is not None


def from_json(text: str | bytes) -> Any:
    """The value whose text that is; also of what was written with bare NaN and Infinity.

    Raises:
        ValueError: it is no JSON.
    """
    return json.loads(text, object_hook=_unnamed)


def as_read(value: Any) -> Any:
    """The value as it will be read: tuples are lists."""
    return from_json(to_json(value))


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {_NAME: name}
    if isinstance(value, dict):
        return {key: _named(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_named(one) for one in value]
    return value


def _unnamed(record: dict[str, Any]) -> Any:
    if record.keys() == {_NAME} and isinstance(record[_NAME], str):
        return _VALUES.get(record[_NAME], record)
    return record
