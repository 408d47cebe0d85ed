"""Sequences packed into one array, in which what they begin with in common stands once."""

from __future__ import annotations

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
"""Tokens whose logits are there at once."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenTree:
    """B sequences, those of rollouts say, for `tree_log_probs`: a token that several have behind
    the same tokens is packed, computed and differentiated once.

    The same tree serves any model. Arrays are padded to some sizes, eight for each power of two,
    so that trees of one kind share compiled programs. Made by `TokenTree.of` on the host.

    Letters: T packed tokens in depth-first order, M whose log-probability is asked for, L of the
    sequence that most are asked for of.
    """

    tokens: Int32[HostOrDevice, " T"]
    plan: TreePlan
    targets: Int32[HostOrDevice, " M"]  # the tokens whose log-probabilities are asked for
    previous: Int32[HostOrDevice, " M"]  # for each, the packed token that it follows
    places: Int32[HostOrDevice, "B L"]  # in `targets`; M where a sequence has no more tokens
    num_tokens: Int32[HostOrDevice, ""]  # packed, padding apart

    @classmethod
    def of(
        cls,
        sequences: Sequence[Sequence[int] | np.ndarray],
        begins: Sequence[int] | None = None,
        *,
        width: int | None = None,
    ) -> TokenTree:
        """Of sequences of token ids, in any order; prefixes in common are found by comparing them.

        Args:
          begins: how many tokens of each sequence are given, its prompt say, and not asked for; at
            least 1. None asks for all tokens but the first.
          width: L; None takes the most that are asked for of one sequence. With the same one in
            every step, a jitted step is compiled less often.

        Raises:
          ValueError: when there is no sequence, one has no token to ask for or no token before it,
            an id is no int32 from 0 on, or a sequence asks for more than `width`.
        """
        arrays, begins = _checked(sequences, begins)
        asked = [len(tokens) - begin for tokens, begin in zip(arrays, begins, strict=True)]
        longest = max(asked)
        if width is not None and longest > width:
            raise ValueError(f"{longest} tokens of a sequence are asked for, and width is {width}")
        packing = _Packing()
        order = sorted(range(len(arrays)), key=lambda index: arrays[index].tolist())
        for index in order:
            packing.add(index, arrays[index], begins[index])
        return packing.tree(begins, longest if width is None else width)

    @property
    def mask(self) -> Bool[HostOrDevice, "B L"]:
        """Where `tree_log_probs` has a token of a sequence and not padding."""
        return self.places < len(self.targets)


def _checked(
    sequences: Sequence[Sequence[int] | np.ndarray], begins: Sequence[int] | None
) -> tuple[list[np.ndarray], list[int]]:
    if not len(sequences):
        raise ValueError("a tree of tokens is of one sequence at least, and there is none")
    begins = [1] * len(sequences) if begins is None else [int(begin) for begin in begins]
    if len(begins) != len(sequences):
        raise ValueError(f"there are {len(sequences)} sequences, and {len(begins)} begins")
    arrays: list[np.ndarray] = []
    for index, (tokens, begin) in enumerate(zip(sequences, begins, strict=True)):
        array = np.asarray(tokens)
        if not 1 <= begin < len(array):
            raise ValueError(
                f"sequence {index} has {len(array)} tokens and {begin} of them given: one at least "
                "must be given, and one asked for"
            )
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"sequence {index} is no sequence of whole numbers")
        if array.min() < 0 or array.max() > np.iinfo(np.int32).max:
            raise ValueError(f"sequence {index} has a token id that is no int32 from 0 on")
        arrays.append(array.astype(np.int32))
    return arrays, begins


class _Packing:
    """Sequences as they are added, each behind those that come before it in their order."""

    def __init__(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._ends = np.zeros(0, np.int64)
        self._count = 0
        self._last = np.zeros(0, np.int32)  # the sequence added last
        self._path = np.zeros(0, np.int64)  # where each of its tokens is packed
        self._paths: dict[int, np.ndarray] = {}
        self._asked: list[np.ndarray] = []

    def add(self, index: int, tokens: np.ndarray, begin: int) -> None:
        """Adds a sequence that no added one comes behind."""
        shared = _in_common(self._last, tokens)
        self._close(shared)
        fresh = len(tokens) - shared
        self._tokens.append(tokens[shared:])
        self._positions.append(np.arange(shared, len(tokens)))
        self._path = np.append(self._path[:shared], self._count + np.arange(fresh))
        self._count += fresh
        self._ends = np.append(self._ends, np.zeros(fresh, np.int64))
        self._last = tokens
        self._paths[index] = self._path
        self._asked.append(self._path[begin:])

    def tree(self, begins: list[int], width: int) -> TokenTree:
        self._close(0)
        padded = padded_size(self._count, TILE)
        tokens, positions, ends = (
            np.pad(array, (0, padded - self._count)).astype(np.int32)
            for array in (
                np.concatenate(self._tokens),
                np.concatenate(self._positions),
                self._ends,
            )
        )
        plan = TreePlan.of(ends, positions, tile=TILE)
        plan = TreePlan.of(ends, positions, tile=TILE, pairs=bucket(len(plan.key_tiles)))
        asked = np.unique(np.concatenate(self._asked))
        rows = padded_size(len(asked), BLOCK_TOKENS)
        before = np.zeros(self._count, np.int64)
        places = np.full((len(begins), width), rows)
        for index, begin in enumerate(begins):
            path = self._paths[index]
            before[path[1:]] = path[:-1]
            places[index, : len(path) - begin] = np.searchsorted(asked, path[begin:])
        fill = (0, rows - len(asked))
        return TokenTree(
            tokens,
            plan,
            np.pad(tokens[asked], fill),
            np.pad(before[asked], fill).astype(np.int32),
            places.astype(np.int32),
            np.array(self._count, np.int32),
        )

    def _close(self, depth: int) -> None:
        """No token below this depth of the last sequence gets another one below it."""
        self._ends[self._path[depth:]] = self._count


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
