"""What each study of `decode` varies, and the points that it measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.decode.config import DecodeConfig
from experiments.harness.errors import UserError


@dataclass(frozen=True)
class Study:
    """Attributes:
    varies: what stands on the x axis, with its unit.
    points: its values by default.
    shared_tokens: by default; one series each.
    log: whether the values are spread by factors.
    published: what the papers say, with where they measured it.
    """

    varies: str
    points: tuple[int, ...]
    shared_tokens: tuple[int, ...] = (2048,)
    log: bool = True
    published: str = ""


STUDIES: Mapping[str, Study] = {
    "completion": Study(
        "completion tokens",
        (16, 32, 64, 128),
        shared_tokens=(1024, 2048, 4096),
        published="Published on an A100 (ChunkAttention, Figure 3), after 512 completion tokens, "
        "PagedAttention -> ChunkAttention in thousand tokens/s: 69 -> 186 (2.7x) with 1,024 shared "
        "tokens, 40 -> 145 (3.6x) with 2,048, 21 -> 102 (4.9x) with 4,096.",
    ),
    "batch": Study(
        "rows",
        (16, 32, 48, 64, 80, 96),
        log=False,
        published="Published on an A100 (ChunkAttention, Figure 4), 2,048 shared tokens: from 155 "
        "thousand tokens/s with 16 rows to 224 with 96 (1.4x).",
    ),
    "shared": Study(
        "shared tokens",
        (0, 1024, 2048, 4096, 8192, 16_384),
        published="Published on an A100 (Hydragen, arXiv 2402.05099): from 1k to 16k shared tokens "
        "throughput falls by less than 15%.",
    ),
    "chunk-size": Study("tokens of a chunk", (16, 32, 64, 128, 256)),
    "steps": Study("steps of a call", (1, 2, 4, 8, 16, 32)),
}
HYDRAGEN_LOSS = 0.15


@dataclass(frozen=True)
class Point:
    """A batch to decode; `completions` are the numbers of tokens after which the time is taken."""

    shared_tokens: int
    own_tokens: int
    rows: int
    chunk_size: int
    steps_per_call: int
    completions: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Decoded for each row."""
        return self.completions[-1]

    @property
    def positions(self) -> int:
        """Of a row at its end."""
        return self.prompt_tokens + self.tokens

    @property
    def prompt_tokens(self) -> int:
        return self.shared_tokens + self.own_tokens

    @property
    def shared_chunks(self) -> int:
        return self.shared_tokens // self.chunk_size

    @property
    def columns(self) -> int:
        """Chunks of a row."""
        return -(-self.positions // self.chunk_size)

    @property
    def num_chunks(self) -> int:
        """Chunks of all rows, the shared ones once."""
        return self.shared_chunks + self.rows * (self.columns - self.shared_chunks)

    @property
    def num_chunks_unshared(self) -> int:
        return self.rows * self.columns

    def tables(self) -> list[list[int]]:
        """The chunks of each row, in order; the shared ones come first in the pool."""
        shared, own = self.shared_chunks, self.columns - self.shared_chunks
        begins = range(shared, self.num_chunks, own)
        return [[*range(shared), *range(begin, begin + own)] for begin in begins]


def varied(config: DecodeConfig) -> tuple[int, ...]:
    """The values of what the study varies, in order."""
    return tuple(sorted(config.points or STUDIES[config.study].points))


def series(config: DecodeConfig) -> tuple[int, ...]:
    """The shared lengths at which the study is made; nothing for the one that varies them.

    Those of the study are halved until they fit `max_positions`.
    """
    if config.study == "shared":
        return ()
    lengths = config.shared_tokens or STUDIES[config.study].shared_tokens
    if config.shared_tokens is not None or config.max_positions is None:
        return lengths
    tokens = max(varied(config)) if config.study == "completion" else config.tokens
    room = max(0, config.max_positions - config.own_tokens - tokens)
    return tuple(dict.fromkeys(_halved(length, room) for length in lengths))


def _halved(length: int, most: int) -> int:
    while length > most:
        length //= 2
    return length


def points_of(config: DecodeConfig) -> dict[str, Point]:
    """The points of a study, by the names of their units."""
    values = varied(config)

    def point(shared_tokens: int, completions: tuple[int, ...], **changes: int) -> Point:
        sizes = {
            "rows": config.rows,
            "chunk_size": config.chunk_size,
            "steps_per_call": config.steps_per_call,
        }
        return Point(shared_tokens, config.own_tokens, completions=completions, **sizes | changes)

    tokens = (config.tokens,)
    if config.study == "completion":
        return {f"{ns} shared tokens": point(ns, values) for ns in series(config)}
    if config.study == "shared":
        return {f"{ns} shared tokens": point(ns, tokens) for ns in values}
    field = {"batch": "rows", "chunk-size": "chunk_size", "steps": "steps_per_call"}[config.study]
    varies = STUDIES[config.study].varies
    return {
        f"{value} {varies}, {ns} shared tokens": point(ns, tokens, **{field: value})
        for ns in series(config)
        for value in values
    }


def check_points(config: DecodeConfig) -> None:
    """Raise `UserError` for a point whose tokens no whole number of calls decodes."""
    for name, point in points_of(config).items():
        for count in point.completions:
            if count % point.steps_per_call:
                raise UserError(
                    f"{name}: {count} tokens are no multiple of {point.steps_per_call} steps a "
                    "call; choose others by --tokens, --points or --steps-per-call"
                )
