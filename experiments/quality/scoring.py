"""Log-probabilities of a given text: by a plain forward pass, and over the chunk pool.

A text is scored as a prefix and windows: every window is read behind the same prefix. Letters: P
tokens of the prefix, W windows, T tokens of a window, V vocabulary, M the model's width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jax_chunkattn import CacheConfig, Engine, chunks_needed, plan_decode
from jax_chunkattn.device.backend import choose_backend
from jax_chunkattn.device.choices import item_columns
from jax_chunkattn.device.decode_loop import decode_attend
from jax_chunkattn.device.decode_rows import DecodeRows
from jax_chunkattn.device.pool import Pool, empty_pool
from jax_chunkattn.device.prefill import prefill_attend
from jax_chunkattn.planning.planner import bucket
from jax_chunkattn.planning.prefill import CALL_TOKENS, Segment, next_call, pack_segments
from models import Decoder
from models.dense_attention import dense_attend
from models.dense_attention import empty_pool as empty_dense_pool
from pallas_kernels.clusters import HeadClusters
from pallas_kernels.codecs import IDENTITY, ChunkCodec
from pallas_kernels.selection import ChunkSelector

_LEAST_CHUNKS = 64  # of a pool

Places = list[tuple[int, slice]]
"""Windows, and which of their tokens."""


@dataclass(frozen=True)
class Passage:
    """What is scored: each target is the token that follows the input in its place."""

    prefix: np.ndarray  # int32 [P]
    inputs: np.ndarray  # int32 [W, T]
    targets: np.ndarray  # int32 [W, T]

    @classmethod
    def of(cls, tokens: Sequence[int], prefix: int, window: int, windows: int) -> Passage:
        """The first `prefix` tokens, and `windows` windows that follow one another behind them."""
        ids = np.asarray(tokens[: passage_tokens(prefix, window, windows)], np.int32)
        inputs, targets = ids[prefix:-1], ids[prefix + 1 :]
        shape = windows, window
        return cls(ids[:prefix], inputs.reshape(shape), targets.reshape(shape))

    @property
    def positions(self) -> int:
        """Of the prefix and a window."""
        return len(self.prefix) + self.inputs.shape[1]


def passage_tokens(prefix: int, window: int, windows: int) -> int:
    """Tokens of text that a passage takes; the last one is only a target."""
    return prefix + window * windows + 1


@dataclass(frozen=True)
class Scores:
    """Of every target, and the token that the model finds likeliest in its place."""

    logprobs: np.ndarray  # float32 [W, T]
    greedy: np.ndarray  # int32 [W, T]

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> Scores:
        return cls(np.zeros(shape, np.float32), np.zeros(shape, np.int32))


def score_plain(model: Decoder, passage: Passage, dtype: str) -> Scores:
    """A causal forward pass over the prefix and the window, for each window: nothing is kept."""
    split = nnx.split(model)
    scores = Scores.empty(passage.targets.shape)
    for window, targets in enumerate(passage.targets):
        tokens = np.concatenate([passage.prefix, passage.inputs[window]])
        logprobs, greedy = _forward(*split, tokens, targets, dtype)
        scores.logprobs[window], scores.greedy[window] = logprobs, greedy
    return scores


def score_by_engine(
    model: Decoder,
    passage: Passage,
    *,
    dtype: str,
    chunk_size: int,
    prefill_tokens: int = CALL_TOKENS[-1],
    implementation: str | None = None,
) -> Scores:
    """`Engine.score` of all windows behind their prefix, which is computed once."""
    windows = np.concatenate([passage.inputs, passage.targets[:, -1:]], axis=1).tolist()
    prefix = passage.prefix.tolist()
    most = chunks_needed([[*prefix, *window] for window in windows], 1, chunk_size=chunk_size)
    with Engine(
        model,
        CacheConfig(most, chunk_size, dtype),
        prefill_tokens=prefill_tokens,
        implementation=implementation,
    ) as engine:
        scores = engine.score(prefix, windows, top=1)
    found = [score.logprobs[1:] for score in scores]
    return Scores(
        np.array([[one.chosen for one in row] for row in found], np.float32),
        np.array([[one.top[0][0] for one in row] for row in found], np.int32),
    )


class SharedScorer:
    """Computes windows over a chunk pool that holds their prefix once.

    The prefix is in whole chunks, and computed by the first call of `hidden` or `decode`.

    Attributes:
      plan_summary: of the plan that all steps of `decode` run by.
      kv_bytes_per_token: of a full chunk.
      kv_bytes_held: by the pool.
      kv_bytes_unshared: what every window's prefix and own tokens would take without sharing.
    """

    def __init__(
        self,
        model: Decoder,
        passage: Passage,
        *,
        dtype: str,
        chunk_size: int,
        codec: str | ChunkCodec = IDENTITY,
        selector: ChunkSelector | None = None,
        clusters: HeadClusters | None = None,
        prefill_tokens: int = CALL_TOKENS[-1],
        implementation: str | None = None,
    ) -> None:
        """Raises ValueError for a prefix that is not in whole chunks, or a codec that cannot store
        the model's."""
        if len(passage.prefix) % chunk_size:
            raise ValueError(f"{len(passage.prefix)} tokens are not whole chunks of {chunk_size}")
        windows = len(passage.inputs)
        shared, columns = len(passage.prefix) // chunk_size, -(-passage.positions // chunk_size)
        own = np.arange(windows * (columns - shared)).reshape(windows, -1) + shared
        self._model = model
        self._prefill_tokens = prefill_tokens
        self._split = nnx.split(model)
        self._passage = passage
        self._tables = [[*range(shared), *chunks] for chunks in own.tolist()]
        num_chunks = bucket(shared + own.size, _LEAST_CHUNKS)  # so that passages share programs
        how = {"codec": codec, "selector": selector, "clusters": clusters}
        cache = CacheConfig(num_chunks, chunk_size, dtype, **how)
        self._cache = cache.for_model(model.cache_spec)
        self._sizes: Any = {"chunk_size": chunk_size, "num_chunks": num_chunks}
        self._backend = choose_backend(model.cache_spec, self._cache, implementation=implementation)
        lengths = [len(passage.prefix)] * windows
        self._sizes["windows"] = model.cache_spec.different_windows
        self._columns = columns
        self._plan, self.plan_summary = plan_decode(
            self._tables,
            lengths,
            options=self._backend.planner,
            columns=None if self._cache.tables_beyond is None else columns,
            **self._sizes,
        )
        self._num_slots = self._plan.num_rows
        chunk_bytes = self._cache.bytes_per_chunk(model.cache_spec)
        self.kv_bytes_per_token = chunk_bytes // chunk_size
        self.kv_bytes_held = (shared + own.size) * chunk_bytes
        self.kv_bytes_unshared = windows * columns * chunk_bytes
        self._pool: Pool | None = None

    def hidden(self) -> np.ndarray:
        """What the model makes of every input before its logits, float32 [W, T, M]; by prefill."""
        found: np.ndarray | None = None
        for places, hidden in self._computed():
            if found is None:
                shape = *self._passage.inputs.shape, hidden.shape[-1]
                found = np.zeros(shape, np.float32)
            _put(found, places, np.asarray(hidden, np.float32))
        assert found is not None, "there is a window"
        return found

    def _computed(self) -> Iterator[tuple[Places, jax.Array]]:
        """Calls of prefill over the windows: whose tokens each has, and the hidden states [N, M] of
        those, with padding behind."""
        pool, begin = self._with_prefix(), len(self._passage.prefix)
        segments = [
            Segment(inputs.tolist(), table, begin, self._passage.positions, begin)
            for inputs, table in zip(self._passage.inputs, self._tables, strict=True)
        ]
        for call, num_tokens in self._calls(segments):
            hidden, pool = self._compute([segment for _, segment in call], num_tokens, pool)
            places = [
                (window, slice(segment.begin - begin, segment.end - begin))
                for window, segment in call
            ]
            yield places, hidden
        self._pool = pool

    def decode(self) -> Scores:
        """A token of every window a step, each fed as the text has it, by two-phase attention."""
        windows, rows = len(self._tables), self._num_slots
        padding = (0, rows - windows), (0, 0)
        scored, self._pool = _decode(
            *self._split,
            self._with_prefix(),
            np.pad(self._passage.inputs, padding),
            np.pad(self._passage.targets, padding),
            np.arange(rows) < windows,
            np.int32(len(self._passage.prefix)),
            self._plan,
            self._backend.decode,
        )
        return Scores(*(np.asarray(values).T[:windows] for values in scored))

    def _with_prefix(self) -> Pool:
        """The pool, which whoever takes it updates in place and gives back."""
        pool, self._pool = self._pool, None
        if pool is not None:
            return pool
        prefix = self._passage.prefix
        pool = empty_pool(self._model.cache_spec, self._cache, self._num_slots, self._columns)
        whole = Segment(prefix.tolist(), self._tables[0], 0, len(prefix), 0)
        for call, num_tokens in self._calls([whole]):
            _, pool = self._compute([segment for _, segment in call], num_tokens, pool)
        return pool

    def _calls(
        self, segments: Sequence[Segment]
    ) -> Iterator[tuple[list[tuple[int, Segment]], int]]:
        """Calls of prefill that compute the segments, each with its index, and their sizes.

        A segment that does not fit into a call is cut, and goes on in the next.
        """
        left = dict(enumerate(segments))
        while left:
            align = self._cache.chunk_size if self._cache.whole_chunks else 1
            call, num_tokens = next_call(list(left.items()), self._prefill_tokens, align=align)
            yield call, num_tokens
            for index, done in call:
                segment = left.pop(index)
                if done.end < segment.end:
                    rest = segment.tokens[done.end - segment.begin :]
                    going_on = replace(segment, tokens=rest, begin=done.end, write_from=done.end)
                    left = {index: going_on, **left}

    def _compute(
        self, segments: list[Segment], num_tokens: int, pool: Pool
    ) -> tuple[jax.Array, Pool]:
        """Hidden states of a call of prefill, and the pool after it."""
        batch = pack_segments(
            segments,
            num_tokens=num_tokens,
            options=self._backend.planner,
            num_slots=self._num_slots if self._cache.whole_chunks else None,
            **self._sizes,
        )
        return _prefill(*self._split, pool, batch, self._backend.prefill)


def _put(array: np.ndarray, places: Places, found: np.ndarray) -> None:
    """Into `array [W, T, ...]` what was `found` for the tokens of these places, packed."""
    at = 0
    for place in places:
        end = at + len(array[place])
        array[place] = found[at:end]
        at = end


@partial(jax.jit, static_argnums=(0, 4))
def _forward(graphdef, state, tokens, targets, dtype: str):
    model = nnx.merge(graphdef, state)
    spec, positions = model.cache_spec, jnp.arange(len(tokens), dtype=jnp.int32)
    attend = dense_attend(positions, spec)
    hidden, _ = model(tokens, positions, empty_dense_pool(spec, len(tokens), dtype), attend)
    return _score(model.logits(hidden[-len(targets) :]), targets)


@partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def _prefill(graphdef, state, pool, batch, implementation: str):
    model = nnx.merge(graphdef, state)
    attend = prefill_attend(model.cache_spec, pool, batch.plan, implementation)
    return model(jnp.asarray(batch.tokens), jnp.asarray(batch.positions), pool, attend)


@partial(jax.jit, static_argnums=(0, 8), donate_argnums=2)
def _decode(graphdef, state, pool, inputs, targets, active, prefix, plan, implementation: str):
    model = nnx.merge(graphdef, state)
    slots = jnp.arange(len(inputs), dtype=jnp.int32)
    columns = item_columns(model.cache_spec, pool, plan)

    def step(pool, fed):
        place, tokens, following = fed
        lengths = jnp.full(len(tokens), prefix + place, jnp.int32)
        rows = DecodeRows(plan, slots, lengths, active)
        attend = decode_attend(model.cache_spec, pool, rows, implementation, columns)
        hidden, pool = model(tokens, lengths, pool, attend)
        return pool.seal(rows), _score(model.logits(hidden), following)

    places = jnp.arange(inputs.shape[1], dtype=jnp.int32)
    pool, scored = lax.scan(step, pool, (places, inputs.T, targets.T))
    return scored, pool


def _score(logits, targets):
    """Log-probabilities of `targets [R]`, and the likeliest tokens, by `logits [R, V]`."""
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets[:, None], axis=1)[:, 0]
    return chosen, jnp.argmax(logits, axis=1).astype(jnp.int32)
