"""The options of `doctor`: none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine can run, and the next command to type."""
