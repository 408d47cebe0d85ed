"""`python -m experiments doctor`: what this machine can run, and what to type next.

Tells the devices that JAX sees and why not others, which attention implementations run, versions,
memory, and what is in the cache. Nothing is fetched, and no network is used. The exit code is 1
when JAX finds no device at all.

    python -m experiments doctor
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from experiments.harness.commands import Command
from experiments.harness.errors import CheckFailed


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine can run, and the next command to type."""


def run(config: DoctorConfig) -> dict[str, Any]:
    """Look around, print what was found, and return it.

    Raises:
        CheckFailed: JAX finds no device.
    """
    del config
    from experiments.doctor.checks import examine
    from experiments.doctor.report import print_findings

    summary = examine()
    print_findings(summary)
    if not summary["devices"]:
        raise CheckFailed("JAX finds no device; see what it says above", summary)
    return summary


DOCTOR = Command("doctor", DoctorConfig, run)
