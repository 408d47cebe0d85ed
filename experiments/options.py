"""What the configs of all subcommands need to describe their options."""

from __future__ import annotations

from typing import Any

import tyro


def by_default(metavar: str, meaning: str) -> Any:
    """How `--help` shows an option whose None stands for `meaning`."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {meaning})")


def option(name: str) -> str:
    """The option on the command line that sets the config's field `name`."""
    return f"--{name.replace('_', '-')}"
