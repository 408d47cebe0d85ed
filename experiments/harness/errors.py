"""Errors that are the user's to mend: shown as one line, without a traceback."""

from __future__ import annotations

import sys
from typing import Any


class UserError(Exception):
    """Something the user gave cannot be used; the message says what, why and what to do."""


class CheckFailed(Exception):
    """What a run was to prove does not hold; its results are written.

    Attributes:
      summary: the run's.
    """

    def __init__(self, message: str, summary: dict[str, Any]) -> None:
        super().__init__(message)
        self.summary = summary


_USER_ERRORS = (
    ("experiments.harness.errors", "UserError"),
    ("jax_chunkattn", "InvalidRequest"),
    ("jax_chunkattn", "PoolExhausted"),
    ("models", "CheckpointError"),
    ("models", "DownloadError"),
    ("models", "LayerFileError"),
    ("models", "HeadPatternError"),
    ("pallas_kernels.implementations", "ImplementationError"),
    ("pallas_kernels.codecs", "CodecError"),
    ("jax_chunkattn.device.logical_axes", "MeshError"),
)


def user_errors() -> tuple[type[BaseException], ...]:
    """The exception types that are told in one line, of the packages imported so far.

    A type whose package was never imported cannot have been raised, and importing it here would
    make every start as slow as importing JAX.
    """
    loaded = ((sys.modules.get(module), name) for module, name in _USER_ERRORS)
    return tuple(getattr(module, name) for module, name in loaded if hasattr(module, name))
