"""Chunks in files, which a later process finds again.

A chunk is a file, and its name is the index: that of the folder says which model, codec and pool it
is of (`tiers.names`), that of the file which tokens. So nothing has to agree with anything else. A
file appears under its name only as a whole, when it is renamed; what has come to it later, or to
the disk, its checksum tells. Two processes may use a folder at once: chunks of one name are equal,
and each takes what the other has written. A table in SQLite beside segments that many chunks share
was considered, as were LMDB and diskcache: they index more chunks for less, and add locks, space to
be reclaimed, and a table that must be repaired when it and the data disagree. Chunks take from tens
of kilobytes to megabytes, so a file for each costs little.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from jax_chunkattn.tiers.names import NAME_BYTES

MAGIC = b"CHUNKKV1"
HEADER = struct.Struct(f"<8s{NAME_BYTES}s{NAME_BYTES}sQI")  # namespace, name, bytes, checksum
FOLDER = "chunks-v1"
SUFFIX, UNFINISHED = ".kv", ".part"
ABANDONED_SECONDS = 600.0
"""What was being written so long ago will not be finished."""
KEPT_PART = 0.9
"""Of what there is room for, so much is left when the oldest have made room."""
LOOKS = 16
"""What others write is counted each time that so large a part of the room has been written."""


class Unreadable(Exception):
    """A chunk that cannot be had from its file.

    Attributes:
      reason: in a word or two, for statistics.
    """

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class DiskTier:
    """Chunks of one namespace in a folder that others may use too; those used last are kept.

    All methods raise OSError when the disk does; `read` raises `Unreadable` then too. Not
    thread-safe, but `has` and `read` may be called while another thread writes.
    """

    def __init__(self, folder: Path, namespace: bytes, chunk_bytes: int, limit: int):
        """Of chunks of `chunk_bytes`, where all files of the folder, of whatever namespace, take at
        most `limit` bytes. What is there is counted, and again now and then: while others write
        there too it may be more, by a sixteenth for each."""
        self._root = folder / FOLDER
        self._namespace = namespace
        self._folder = self._root / namespace.hex()
        self._chunk_bytes = chunk_bytes
        self._limit = limit
        self._numbers = itertools.count()
        self._known: set[bytes] = set()
        self._used = 0
        self._written = 0  # since all files were counted
        self._make(self._folder)
        self._look()

    def __len__(self) -> int:
        """Chunks of this namespace, as far as is known."""
        return len(self._known)

    @property
    def used_bytes(self) -> int:
        """Bytes of all files in the folder, as far as is known."""
        return self._used

    def has(self, name: bytes) -> bool:
        """Whether there is a file, of this process or of another."""
        if name in self._known:
            return True
        if not self._path(name).exists():
            return False
        self._known.add(name)
        return True

    def read(self, name: bytes) -> np.ndarray:
        """A chunk's bytes, uint8, as they were written.

        Raises:
          Unreadable: when the file is gone, cannot be read, is of something else, was cut or
            changed. It is not found again then.
        """
        path = self._path(name)
        try:
            return self._checked(path, name)
        except Unreadable as error:
            self._known.discard(name)
            if error.reason in ("cut", "damaged", "of another"):
                with contextlib.suppress(OSError):
                    path.unlink()
            raise

    def use(self, names: Iterable[bytes]) -> None:
        """Has these chunks, each before what it is found behind, be those used last: what prompts
        begin with goes after what follows it. Those that are gone are not known any longer."""
        for name in names:
            try:
                os.utime(self._path(name))
            except FileNotFoundError:
                self._known.discard(name)
            except OSError:  # it may go earlier than it should
                continue

    def write(self, name: bytes, chunk: np.ndarray) -> bool:
        """Keeps a chunk, uint8; False where it is there, or there is no room for any."""
        if self.has(name):
            return False
        size = HEADER.size + chunk.nbytes
        if self._written + size > self._limit / LOOKS:
            self._look()
        if self._used + size > self._limit and not self._make_room(size):
            return False
        header = self._header(name, chunk)
        path = self._path(name)
        part = path.with_suffix(f".{os.getpid()}-{next(self._numbers)}{UNFINISHED}")
        self._make(path.parent)
        try:
            with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(header)
                file.write(chunk.data)
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        self._known.add(name)
        self._used += size
        self._written += size
        return True

    def clear(self) -> None:
        """Removes the files of this namespace."""
        self._known.clear()
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)
        self._look()

    def _path(self, name: bytes) -> Path:
        text = name.hex()
        return self._folder / text[:2] / (text + SUFFIX)

    def _name(self, path: Path) -> bytes | None:
        """Of the chunk of this namespace that a file is of."""
        if path.parent.parent != self._folder:
            return None
        with contextlib.suppress(ValueError):
            name = bytes.fromhex(path.stem)
            return name if self._path(name) == path else None

    def _make(self, folder: Path) -> None:
        """The folder and those above it, which only the user may look into."""
        if folder.exists():
            return
        for one in (*reversed(folder.parents), folder):
            inside = one == self._root or self._root in one.parents
            if not one.exists():
                one.mkdir(mode=0o700 if inside else 0o777, exist_ok=True)

    def _header(self, name: bytes, chunk: np.ndarray) -> bytes:
        fields = MAGIC, self._namespace, name, chunk.nbytes
        return HEADER.pack(*fields, _checksum(HEADER.pack(*fields, 0), chunk))

    def _checked(self, path: Path, name: bytes) -> np.ndarray:
        chunk = np.empty(self._chunk_bytes, np.uint8)
        try:
            with open(path, "rb", buffering=0) as file:
                header = file.read(HEADER.size)
                count = _read_into(file, chunk)
                more = file.read(1)
        except FileNotFoundError:
            raise Unreadable("gone") from None
        except OSError as error:
            raise Unreadable(words_of(error)) from error
        if len(header) < HEADER.size:
            raise Unreadable("cut")
        *fields, checksum = HEADER.unpack(header)
        if fields[:3] != [MAGIC, self._namespace, name] or fields[3] != chunk.nbytes:
            raise Unreadable("of another")
        if count < chunk.nbytes:
            raise Unreadable("cut")
        if more or checksum != _checksum(HEADER.pack(*fields, 0), chunk):
            raise Unreadable("damaged")
        return chunk

    def _make_room(self, size: int) -> bool:
        """Removes the files that were used longest ago, whosever they are."""
        files = sorted(self._look())
        limit = self._limit * KEPT_PART if self._used + size > self._limit else self._limit
        for _, path, taken in files:
            if self._used + size <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._used -= taken
            if (name := self._name(path)) is not None:
                self._known.discard(name)
        return self._used + size <= self._limit

    def _look(self) -> list[tuple[float, Path, int]]:
        """When each chunk's file was last used, and its bytes; what was left unfinished is removed.

        Counts what is there, that of other processes too.
        """
        files, known, used = [], set(), 0
        for path, status in _files_below(self._root):
            if path.suffix == UNFINISHED and time.time() - status.st_mtime > ABANDONED_SECONDS:
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            used += status.st_size
            if path.suffix == SUFFIX:
                files.append((status.st_mtime, path, status.st_size))
                if (name := self._name(path)) is not None:
                    known.add(name)
        self._known, self._used, self._written = known, used, 0
        return files


def _files_below(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All files, while others may remove some."""
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry.path))
        else:
            with contextlib.suppress(FileNotFoundError):
                yield Path(entry.path), entry.stat(follow_symlinks=False)


def _read_into(file, chunk: np.ndarray) -> int:
    """Bytes read, as many as there are and fit."""
    count, view = 0, chunk.data
    while count < len(view):
        more = file.readinto(view[count:])
        if not more:
            break
        count += more
    return count


def _checksum(header: bytes, chunk: np.ndarray) -> int:
    return zlib.crc32(chunk.data, zlib.crc32(header))


def words_of(error: OSError) -> str:
    """What went wrong, for statistics."""
    return (error.strerror or type(error).__name__).lower()
