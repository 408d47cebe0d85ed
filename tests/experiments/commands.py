"""Commands that do something else in a test."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from experiments.cli import EXPERIMENTS


def run_instead(monkeypatch: pytest.MonkeyPatch, name: str, run: Callable[[Any], Any]) -> None:
    """Let the command line call `run` for the experiment of that name."""
    monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(EXPERIMENTS[name], run=run))
