"""The errors of loading a model; they are raised before anything is changed."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint file cannot be used; the message names the file and what is wrong with it."""


class DownloadError(RuntimeError):
    """A checkpoint could not be fetched; the message says what failed and what to do instead."""


class HeadPatternError(ValueError):
    """A head pattern cannot be used; the message says what is wrong with it."""


class LayerFileError(ValueError):
    """A file of what was measured of a model's layers cannot be used; the message says why."""
