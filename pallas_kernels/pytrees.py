"""Frozen dataclasses as JAX pytrees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from operator import attrgetter
from typing import TypeVar

from jax.tree_util import GetAttrKey, register_pytree_with_keys

T = TypeVar("T")

STATIC = {"static": True}
"""Metadata of a field that is part of the tree's structure and not a child."""


def register_pytree(cls: type[T]) -> type[T]:
    """Makes a frozen dataclass a pytree: its fields are children, those with `STATIC` metadata not.

    As `jax.tree_util.register_dataclass`, except that JAX rebuilds an instance without calling its
    `__init__`. The annotations of the fields are what a caller must give; JAX also rebuilds with
    shapes, shardings and placeholders in the place of arrays, and a checked `__init__` would
    refuse those.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    names = tuple(field.name for field in fields if field.metadata != STATIC)
    static = tuple(field.name for field in fields if field.metadata == STATIC)
    keys = tuple(map(GetAttrKey, names))
    children, values = _getter(names), _getter(static)

    def flatten(instance):
        return children(instance), values(instance)

    def flatten_with_keys(instance):
        return tuple(zip(keys, children(instance), strict=True)), values(instance)

    def unflatten(values, children):
        instance = object.__new__(cls)
        vars(instance).update(zip(names, children, strict=True))
        vars(instance).update(zip(static, values, strict=True))
        return instance

    register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _getter(names: tuple[str, ...]) -> Callable[[object], tuple]:
    """What gives these fields of an instance; `attrgetter` alone where that gives a tuple, since
    every call of an engine flattens a plan."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda instance: tuple(getattr(instance, name) for name in names)
