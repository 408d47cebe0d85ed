"""`python -m experiments doctor`: what this machine can run, and what to type next.

Tells the devices that JAX sees and why not others, which attention implementations run, versions,
memory, and what is in the cache. Nothing is fetched, and no network is used. The exit code is 1
when JAX finds no device at all.

    python -m experiments doctor
"""

from __future__ import annotations

from typing import Any

from experiments.doctor.config import DoctorConfig
from experiments.harness.commands import Command
from experiments.harness.errors import CheckFailed


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
