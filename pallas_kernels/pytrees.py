"""Frozen dataclasses as JAX pytrees."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from jax.tree_util import GetAttrKey, register_pytree_with_keys

T = TypeVar("T")


def register_pytree(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass a pytree, with its fields as children.

    As `jax.tree_util.register_dataclass`, except that JAX rebuilds an instance without calling its
    `__init__`. The annotations of the fields are what a caller must give; JAX also rebuilds with
    shapes, shardings and placeholders in the place of arrays, and a checked `__init__` would
    refuse those.
    """
    names = tuple(field.name for field in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
    keys = tuple(map(GetAttrKey, names))

    def flatten(instance):
        return tuple(map(vars(instance).__getitem__, names)), None

    def flatten_with_keys(instance):
        return tuple(zip(keys, flatten(instance)[0], strict=True)), None

    def unflatten(_, children):
        instance = object.__new__(cls)
        vars(instance).update(zip(names, children, strict=True))
        return instance

    register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
