"""Retrieval and streaming heads: patterns, their files, and how they are found (DuoAttention)."""

from __future__ import annotations

from models.head_patterns.copy_scores import copy_scores
from models.head_patterns.gates import GateLoss, GateTraining
from models.head_patterns.pattern import RECENT, SINKS, HeadPattern, with_pattern
from models.head_patterns.pattern_file import (
    load_pattern,
    pattern_files,
    read_pattern,
    write_pattern,
)

__all__ = [
    "RECENT",
    "SINKS",
    "GateLoss",
    "GateTraining",
    "HeadPattern",
    "copy_scores",
    "load_pattern",
    "pattern_files",
    "read_pattern",
    "with_pattern",
    "write_pattern",
]
