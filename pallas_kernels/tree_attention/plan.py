"""What attention within a packed tree of tokens reads.

The tokens of a tree lie in depth-first order, each once. Those that see a token are then
consecutive: itself and everything below it. So a mask of all pairs is one number for each token,
where its subtree ends (as in FlashMask, arXiv 2410.01359, section 3, whose masks are ranges of
rows for each column). Tiles of tokens that see nothing of one another are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from pallas_kernels.plans import HostOrDevice


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeadWindows:
    """What the heads of a layer see of the tokens before a query, where they do not see all: the
    last `sizes`, itself among them, and the first `sinks` of the sequence. See `windows.Window`."""

    sizes: Int32[HostOrDevice, " Hkv"]
    sinks: Int32[HostOrDevice, " Hkv"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TreePlan:
    """Who sees whom in a packed tree, and which pairs of tiles hold such tokens.

    Both ways through the pairs are there: a forward kernel goes through the key tiles of each
    query tile, and one for the gradients of keys and values through the query tiles of each key
    tile, which are `t` to `last_query_tile[t]`.

    Letters: T packed tokens, a multiple of `tile`; Q = T / tile tiles; E = Q + 1; P pairs of tiles.
    """

    ends: Int32[HostOrDevice, " T"]  # one past the last token of the subtree; 0 for padding
    positions: Int32[HostOrDevice, " T"]  # in each sequence that the token is in
    pair_begin: Int32[
        HostOrDevice, " E"
    ]  # of each query tile, into `key_tiles`; its end is the next one's
    key_tiles: Int32[HostOrDevice, " P"]
    last_query_tile: Int32[HostOrDevice, " Q"]  # t - 1 where no query sees a token of key tile t
    tile: int = field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        ends: Int32[np.ndarray, " T"],
        positions: Int32[np.ndarray, " T"],
        *,
        tile: int,
    ) -> TreePlan:
        """Of where subtrees end. There is room for all pairs of tiles, whatever the tree, so that
        programs depend on T alone.

        Raises:
          ValueError: when T is not a multiple of `tile`.
        """
        if len(ends) % tile:
            raise ValueError(f"{len(ends)} tokens are no multiple of a tile of {tile}")
        number = len(ends) // tile
        furthest = ends.reshape(number, tile).max(axis=1, initial=0)
        last = np.maximum(-(-furthest // tile), np.arange(number)) - 1
        tiles = np.arange(number)
        seen = (tiles[None] <= tiles[:, None]) & (tiles[:, None] <= last[None])
        begin = np.concatenate([[0], seen.sum(axis=1).cumsum()])
        keys = np.nonzero(seen)[1]
        keys = np.pad(keys, (0, number * (number + 1) // 2 - len(keys)))
        return cls(
            np.asarray(ends, np.int32),
            np.asarray(positions, np.int32),
            begin.astype(np.int32),
            keys.astype(np.int32),
            last.astype(np.int32),
            tile,
        )

    def sees(
        self,
        first_query: int | Int32[Array, ""],
        first_key: int | Int32[Array, ""],
        number: int,
        window: tuple[Int32[HostOrDevice, ""], Int32[HostOrDevice, ""]] | None = None,
    ) -> Bool[Array, "number number"]:
        """Whether each of some packed tokens sees each of as many others, with a window (its size
        and sinks) or without."""
        each = jnp.arange(number, dtype=jnp.int32)
        query, key = (first_query + each)[:, None], (first_key + each)[None]
        end = lax.dynamic_slice_in_dim(jnp.asarray(self.ends), first_key, number)[None]
        seen = (key <= query) & (query < end)
        if window is None:
            return seen
        size, sinks = window
        positions = jnp.asarray(self.positions)
        place = lax.dynamic_slice_in_dim(positions, first_key, number)[None]
        reach = lax.dynamic_slice_in_dim(positions, first_query, number)[:, None] - size
        return seen & ((place < sinks) | (place > reach))
