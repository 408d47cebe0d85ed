"""A stand-in for the engine, and measurements made up for the tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.loading import fetched
from pallas_kernels.cache_folder import CACHE_VARIABLE
from tests.fixtures_weights import CACHE


@pytest.fixture(autouse=True, scope="module")
def _own_cache_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As `_own_cache`, for what a module's tests have in common."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(_cache(tmp_path_factory.mktemp("cache"))))
        yield


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each test has a cache folder of its own: no program is there, and nothing is fetched."""
    folder = tmp_path.with_name(f"{tmp_path.name}-cache")  # what a test writes is alone in its own
    folder.mkdir()
    monkeypatch.setenv(CACHE_VARIABLE, str(_cache(folder)))
    fetched.cache_clear()


def _cache(folder: Path) -> Path:
    """The folder with the user's compiled kernel alone, which takes many seconds to make."""
    (CACHE / "native").mkdir(parents=True, exist_ok=True)
    (folder / "native").symlink_to(CACHE / "native", target_is_directory=True)
    return folder


class FakeHandle:
    """A request of a `FakeEngine`."""

    def __init__(self, params: Any) -> None:
        self.params = params
        self.chosen: list[int] = []
        self.finish_reason: str | None = None
        self.error: Exception | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(self.chosen)

    @property
    def done(self) -> bool:
        return self.finish_reason is not None


class FakeEngine:
    """Decodes one token a step; request i stops after i + 1 tokens. `interrupt_at` is a step."""

    interrupt_at: int | None = None

    def __init__(self, model: Any, cache: Any, **settings: Any) -> None:
        self.settings = settings
        self.backend = SimpleNamespace(decode=settings["implementation"] or "xla")
        self.handles: list[FakeHandle] = []
        self.closed = False
        self.steps = 0
        self.stats = SimpleNamespace(
            reads=None,
            plan_decision="shared",
            shared_tokens=64,
            prefill_tokens=4,
            decode_tokens=0,
            compile_seconds=0.25,
            prefill_seconds=2.0,
            decode_seconds=0.0,
            kv_bytes_held=1000,
            kv_bytes_unshared=4000,
        )

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def submit(
        self, prompt: Sequence[int], params: Any, *, prefix: str | None = None
    ) -> FakeHandle:
        self.handles.append(FakeHandle(params))
        return self.handles[-1]

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        for index, handle in enumerate(self.handles):
            if not handle.done:
                handle.chosen.append(self.steps)
                self.stats.decode_tokens += 1
                self.stats.decode_seconds += 0.5
                if len(handle.tokens) == index + 1:
                    handle.finish_reason = "stop"


@pytest.fixture
def fake_engine(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """Puts a fresh `FakeEngine` class in the place of `Engine`."""
    from experiments.generate import decoding

    engine = type("Engine", (FakeEngine,), {})
    monkeypatch.setattr(decoding, "Engine", engine)
    return engine


@pytest.fixture
def make_measured() -> Callable[..., Any]:
    """Builds a `Measured` of a shared run of 32 requests; keyword arguments replace fields."""
    from experiments.generate.decoding import Measured

    measured = Measured(
        batch=32,
        sharing=True,
        implementation="xla",
        plan_decision="shared",
        shared_tokens=2048,
        prefill_tokens_computed=1000,
        prefill_tokens_reused=3000,
        decode_tokens=600,
        compile_seconds=9.0,
        prefill_seconds=2.0,
        decode_seconds=5.0,
        first_answer_seconds=12.0,
        kv_bytes_held=1 << 20,
        kv_bytes_unshared=1 << 23,
        compilations=7,
        compilations_from_cache=2,
        max_rss_bytes=1 << 30,
        answers=((1, 2), (3, 4)),
    )
    return lambda **changes: replace(measured, **changes)
