"""Traces of requests to a recorded service, in the format of Mooncake's releases.

JSON lines of `timestamp` (milliseconds), `input_length` and `output_length` (tokens), and
`hash_ids`, which name the prompt's blocks of 512 tokens: equal ids are equal prefixes. (Qin et al.,
FAST 2025; github.com/kvcache-ai/Mooncake.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from experiments.harness.errors import UserError

BLOCK_TOKENS = 512
"""Tokens of a block."""

Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class TraceRequest:
    """One line: when it came, in seconds, and its lengths in the service's own tokens."""

    seconds: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_lines(path: Path, parse: Callable[[Any], Parsed]) -> Iterator[Parsed]:
    """What `parse` makes of each line; it may raise ValueError, TypeError, KeyError, OverflowError.

    Raises:
        UserError: the file cannot be read, or a line is not a request, naming it.
    """
    number = 1
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                yield parse(json.loads(line))
                number += 1
    except OSError as error:
        raise UserError(f"--trace {path} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--trace {path} is not UTF-8 text, from line {number} on") from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        where = f"--trace {path}, line {number}"
        raise UserError(f"{where}: not a request of such a trace: {error!r}") from error


def read_requests(path: Path, count: int, *, every: int = 1) -> list[TraceRequest]:
    """The first `count` requests of every `every`-th conversation, in the order of arrival.

    Requests are of one conversation when their prompts have the first two blocks in common: the
    first alone is the system prompt of all. Lines behind the last one needed are not read.

    Raises:
        UserError: the file cannot be read, a line is not a request, or there are too few.
    """
    conversations: dict[tuple[int, ...], int] = {}
    requests: list[TraceRequest] = []
    for request in read_lines(path, _Parser()):
        number = conversations.setdefault(request.blocks[:2], len(conversations))
        if number % every == 0:
            requests.append(request)
        if len(requests) == count:
            return requests
    kept = "" if every == 1 else f" when one conversation in {every} is kept"
    raise UserError(f"--requests {count}: --trace {path} has {len(requests)}{kept}")


def read_trace(path: Path) -> list[TraceRequest]:
    """All requests, in the order of arrival.

    Raises:
        UserError: the file cannot be read, a line is not a request, or there is none.
    """
    requests = list(read_lines(path, _Parser()))
    if not requests:
        raise UserError(f"--trace {path} holds no requests")
    return requests


def ideal_block_hit_rate(requests: Iterable[TraceRequest]) -> float:
    """The share of blocks, the last of a prompt included, that a cache without bound would find."""
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        hits += sum(1 for _ in takewhile(seen.__contains__, request.blocks))
        total += len(request.blocks)
        seen.update(request.blocks)
    return hits / total


class _Parser:
    """Makes a `TraceRequest` of a line's value; times must not go back from line to line."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, value: Any) -> TraceRequest:
        milliseconds = value["timestamp"]
        if not self._last <= milliseconds < math.inf:
            raise ValueError(
                f"timestamp must be a number of milliseconds from {self._last} up, "
                f"got {milliseconds!r}"
            )
        input_tokens = _whole(value, "input_length", at_least=1)
        output_tokens = _whole(value, "output_length", at_least=1)
        blocks = value["hash_ids"]
        if not isinstance(blocks, list) or not all(_is_whole(block, 0) for block in blocks):
            raise ValueError(f"hash_ids must be a list of ids from 0 up, got {blocks!r:.60}")
        if len(blocks) != -(-input_tokens // BLOCK_TOKENS):
            raise ValueError(
                f"input_length {input_tokens} takes {-(-input_tokens // BLOCK_TOKENS)} blocks of "
                f"{BLOCK_TOKENS}, hash_ids has {len(blocks)}"
            )
        self._last = milliseconds
        return TraceRequest(1e-3 * milliseconds, input_tokens, output_tokens, tuple(blocks))


def _whole(value: Any, name: str, *, at_least: int) -> int:
    number = value[name]
    if not _is_whole(number, at_least):
        raise ValueError(f"{name} must be a whole number from {at_least} up, got {number!r}")
    return number


def _is_whole(number: Any, at_least: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= at_least
