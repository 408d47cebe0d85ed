"""One endpoint for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("uvicorn", reason="needs the extra server")
pytest.importorskip("starlette", reason="needs the extra server")

from tests.jax_chunkattn.server.endpoints import Running, running


@pytest.fixture(scope="session")
def tiny() -> Iterator[Running]:
    with running() as found:
        yield found
