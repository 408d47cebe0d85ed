"""`pytest tests/models/parity --write` keeps what transformers made of the cases, and the figures.

That is: golden/*.npz, which the tests without transformers read, and models/parity.json, which
`python -m experiments models` and the README show.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import models

PACKAGES = ("transformers", "torch", "jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="keep golden files and figures")


@pytest.fixture(scope="session")
def write(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--write", False))


@pytest.fixture(scope="session")
def theirs() -> Any:
    """What asks transformers, which takes seconds to import: who runs no such test need not."""
    from tests.models.parity import theirs

    return theirs


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest, write: bool) -> Iterator[dict[str, Any]]:
    """What each case measured, by its name; kept at the end unless a test has failed."""
    cases: dict[str, Any] = {}
    yield cases
    if write and not request.session.testsfailed:
        versions = {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES}
        parity = {"versions": versions, "date": f"{datetime.date.today()}", "cases": cases}
        path = Path(models.__file__).parent / "parity.json"
        path.write_text(json.dumps(parity, indent=1) + "\n")
