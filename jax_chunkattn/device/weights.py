"""New values for the arrays of a model that is being served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class InvalidWeights(ValueError):
    """Values that are not those of the model's arrays; nothing has changed."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a tree, by the path of each: `blocks.qkv`.

    An NNX state and the plain dictionary of it have the same names.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(filter(None, map(_name, path))): leaf for path, leaf in leaves}


def _name(key: Any) -> str:
    """Of one step of a path; nothing for that from a variable to its value."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return ""
    for attribute in ("key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def matching_values(weights: Any, current: Mapping[str, Any]) -> list[Any]:
    """The values of new weights in the order of the `current` ones.

    Args:
      weights: a model, its NNX state, or any tree of arrays, or of what makes them, with the same
        paths.
      current: the arrays that are served, by name.

    Raises:
      InvalidWeights: when a name is missing or unknown, a shape differs, a value is no array of
        numbers of that kind, or has been deleted.
    """
    from flax import nnx

    found = named_leaves(nnx.state(weights) if isinstance(weights, nnx.Module) else weights)
    missing, unknown = current.keys() - found.keys(), found.keys() - current.keys()
    if missing or unknown:
        problems = [
            f"{what} {_listed(names)}"
            for what, names in (("there is no", missing), ("nothing is named", unknown))
            if names
        ]
        raise InvalidWeights(f"weights do not fit the model: {'; '.join(problems)}")
    for name, old in current.items():
        _check(name, found[name], old)
    return [found[name] for name in current]


def _listed(names: set[str]) -> str:
    some = sorted(names)[:3]
    more = f" and {len(names) - len(some)} more" if len(names) > len(some) else ""
    return ", ".join(some) + more


def _check(name: str, new: Any, old: Any) -> None:
    if not isinstance(new, jax.Array | np.ndarray | _Stored):
        raise InvalidWeights(f"{name} is no array but {new!r:.60}")
    if new.shape != old.shape:
        raise InvalidWeights(f"{name} has the shape {new.shape}, the model's has {old.shape}")
    kinds = [jnp.issubdtype(one.dtype, jnp.floating) for one in (new, old)]
    if kinds[0] != kinds[1] or not (kinds[0] or new.dtype == old.dtype):
        raise InvalidWeights(f"{name} is of {new.dtype}, the model's of {old.dtype}")
    traced = isinstance(new, Tracer)
    if isinstance(new, jax.Array) and not traced and new.is_deleted():
        raise InvalidWeights(f"{name} has been deleted, or donated to a computation")


@runtime_checkable
class _Stored(Protocol):
    """What makes an array when NumPy asks for one, and says which before: a weight in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self) -> np.ndarray: ...


class PartlyReplaced(RuntimeError):
    """Some arrays have new values and others could not get theirs."""


class Replacement:
    """New values on their way into the arrays of a model, one after another, the largest first.

    Beside both there is one array more at most, and if that can be had for the first the others
    will fit. The values are copied, in the types of the arrays and to where they lie: whoever gave
    them may do with them what he likes afterwards.

    Attributes:
      begun: some array may have its new value.
    """

    def __init__(self, values: Sequence[Any]):
        self.begun = False
        self._values = values
        self._done = 0

    def carry_out(self, leaves: list[jax.Array]) -> None:
        """Replaces what is not yet; may be called again where Ctrl-C has broken it off.

        Raises:
          PartlyReplaced: when a copy fails, but for the first: what that raises has changed
            nothing.
        """
        order = sorted(range(len(leaves)), key=lambda index: -leaves[index].nbytes)
        for number in range(self._done, len(order)):
            index = order[number]
            try:
                copied = _copy(self._values[index], leaves[index])
            except Exception as error:
                if not self.begun:
                    raise
                message = f"{number} of {len(leaves)} arrays are new: {error}"
                raise PartlyReplaced(message) from error
            self.begun = True
            leaves[index] = copied
            self._done = number + 1


def _copy(value: Any, like: jax.Array) -> jax.Array:
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    cast = value.astype(like.dtype) if value.dtype != like.dtype else value
    return jax.block_until_ready(jax.device_put(cast, like.sharding, may_alias=False))
