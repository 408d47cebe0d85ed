"""Sequences packed into one array, in which what they begin with in common stands once."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Int32

from jax_chunkattn.planning.planner import bucket
from pallas_kernels.plans import HostOrDevice
from pallas_kernels.tree_attention import TreePlan

TILE = 64
"""Tokens of a tile. On two cores with AVX-512, for 1,024 tokens and 8 times 128 below them, 9 heads
of 64, forward and backward take 1.45 times as long with 32, and 1.3 with 256."""
BLOCK_TOKENS = 128
"""Tokens whose logits are there at once; T is a multiple of it."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenTree:
    """B sequences, those of rollouts say, for `tree_log_probs`: a token that several have behind
    the same tokens is packed, computed and differentiated once.

    The same tree serves any model. Made by `TokenTree.of` on the host; a program is compiled for
    each T, B and L there is.

    Letters: T packed tokens in depth-first order, with padding; L asked for of one sequence, at
    most.
    """

    tokens: Int32[HostOrDevice, " T"]
    plan: TreePlan
    previous: Int32[HostOrDevice, " T"]  # the packed token each follows; T if it is not asked for
    places: Int32[HostOrDevice, "B L"]  # of those asked for; T where a sequence has no more
    num_tokens: Int32[HostOrDevice, ""]  # packed, padding apart

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int] | np.ndarray],
        begins: Sequence[int] | None = None,
        *,
        width: int | None = None,
        min_tokens: int = 1,
    ) -> TokenTree:
        """Of sequences of token ids, in any order; prefixes in common are found by comparing them.

        Args:
          begins: how many tokens of each sequence are given, its prompt say, and not asked for; at
            least 1. None asks for all tokens but the first.
          width: L; None takes the most that are asked for of one sequence.
          min_tokens: T is the next of eight sizes for each power of two above as many tokens as
            there are, or above these. As many as any step's tree has make one program do for all.

        Raises:
          ValueError: when there is no sequence, one has no token to ask for or no token before it,
            an id is no int32 from 0 on, or a sequence asks for more than `width`.
        """
        arrays, begins = _checked(sequences, begins)
        longest = max(len(tokens) - begin for tokens, begin in zip(arrays, begins, strict=True))
        if width is not None and longest > width:
            raise ValueError(f"{longest} tokens of a sequence are asked for, and width is {width}")
        packing = _Packing(sum(map(len, arrays)))
        order = sorted(range(len(arrays)), key=lambda index: arrays[index].tolist())
        paths = {index: packing.add(arrays[index], begins[index]) for index in order}
        asked = [paths[index] for index in range(len(arrays))]
        return packing.tree(asked, longest if width is None else width, min_tokens)

    @property
    def mask(self) -> Bool[HostOrDevice, "B L"]:
        """Where `tree_log_probs` has a token of a sequence and not padding."""
        return self.places < len(self.tokens)


def _checked(
    sequences: Sequence[Sequence[int] | np.ndarray], begins: Sequence[int] | None
) -> tuple[list[np.ndarray], list[int]]:
    if not len(sequences):
        raise ValueError("a tree of tokens is of one sequence at least, and there is none")
    begins = [1] * len(sequences) if begins is None else [operator.index(begin) for begin in begins]
    if len(begins) != len(sequences):
        raise ValueError(f"there are {len(sequences)} sequences, and {len(begins)} begins")
    arrays: list[np.ndarray] = []
    for index, (tokens, begin) in enumerate(zip(sequences, begins, strict=True)):
        array = np.asarray(tokens)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise ValueError(f"sequence {index} is no sequence of whole numbers")
        if not 1 <= begin < len(array):
            raise ValueError(
                f"sequence {index} has {len(array)} tokens and {begin} of them given: one at least "
                "must be given, and one asked for"
            )
        if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
            raise ValueError(f"sequence {index} has a token id that is no int32 from 0 on")
        arrays.append(array.astype(np.int32))
    return arrays, begins


class _Packing:
    """Sequences as they are added, each behind those that come before it in their order.

    A token is followed by those that are packed behind it, in any of its sequences, until one is
    packed that is not below it.
    """

    def __init__(self, capacity: int) -> None:
        """With room for so many tokens."""
        self._tokens, self._positions, self._ends, self._previous = np.zeros(
            (4, capacity), np.int32
        )
        self._asked = np.zeros(capacity, bool)
        self._count = 0
        self._last = np.zeros(0, np.int32)  # the sequence added last
        self._path = np.zeros(0, np.int32)  # where each of its tokens is packed

    def add(self, tokens: np.ndarray, begin: int) -> np.ndarray:
        """Adds a sequence that no added one comes behind; where those it asks for are packed."""
        shared = _in_common(self._last, tokens)
        self._close(shared)
        fresh = np.arange(self._count, self._count + len(tokens) - shared, dtype=np.int32)
        path = np.concatenate([self._path[:shared], fresh])
        self._tokens[path[shared:]] = tokens[shared:]
        self._positions[path[shared:]] = np.arange(shared, len(tokens))
        self._previous[path[1:]] = path[:-1]
        self._asked[path[begin:]] = True
        self._count += len(fresh)
        self._last, self._path = tokens, path
        return path[begin:]

    def tree(self, asked: list[np.ndarray], width: int, min_tokens: int) -> TokenTree:
        """Of what was added; `asked` is what `add` said of each sequence."""
        self._close(0)
        size = padded_size(max(self._count, min_tokens), BLOCK_TOKENS)
        packed = (self._tokens, self._positions, self._ends)
        tokens, positions, ends = (_resized(array, size, 0) for array in packed)
        previous = np.where(self._asked, self._previous, size)
        places = [_resized(path, width, size) for path in asked]
        return TokenTree(
            tokens,
            TreePlan.of(ends, positions, tile=TILE),
            _resized(previous, size, size),
            np.stack(places),
            np.array(self._count, np.int32),
        )

    def _close(self, depth: int) -> None:
        """No token below this depth of the last sequence gets another one below it."""
        self._ends[self._path[depth:]] = self._count


def _resized(array: np.ndarray, size: int, fill: int) -> np.ndarray:
    """Of `size` numbers: cut, or filled up."""
    return np.pad(array[:size], (0, max(0, size - len(array))), constant_values=fill).astype(
        np.int32
    )


def _in_common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(one), len(other))
    differ = np.nonzero(one[:length] != other[:length])[0]
    return int(differ[0]) if len(differ) else length


def padded_size(count: int, unit: int) -> int:
    """`count` rounded up to a multiple of `unit`, or of an eighth of the power of two below it.

    So less than an eighth of it is added, or less than a unit, and each power has eight sizes.
    """
    step = max(unit, bucket(count) // 16)
    return -(-count // step) * step
