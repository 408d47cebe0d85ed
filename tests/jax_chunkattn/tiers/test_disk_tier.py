"""Chunks in files: what is found is what was written, whatever happens to the folder."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jax_chunkattn
from jax_chunkattn.tiers.disk import (
    ABANDONED_SECONDS,
    FOLDER,
    HEADER,
    LOOKS,
    UNFINISHED,
    DiskTier,
    Unreadable,
)

BYTES = 1000
NAMESPACE, OTHER = b"n" * 16, b"o" * 16
PLENTY = 1 << 30


def name_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def chunk_of(number: int, size: int = BYTES) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


def tier(folder: Path, namespace: bytes = NAMESPACE, limit: int = PLENTY) -> DiskTier:
    return DiskTier(folder, namespace, BYTES, limit)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_what_is_written_is_found_by_another(tmp_path: Path):
    first = tier(tmp_path)
    assert first.write(name_of(1), chunk_of(1))
    assert not first.write(name_of(1), chunk_of(1)), "it is there"
    later = tier(tmp_path)
    for one in (first, later):
        assert one.has(name_of(1))
        assert not one.has(name_of(2))
        np.testing.assert_array_equal(one.read(name_of(1)), chunk_of(1))
        assert (len(one), one.used_bytes) == (1, BYTES + HEADER.size)


def test_two_at_once_find_what_either_writes(tmp_path: Path):
    first, second = tier(tmp_path), tier(tmp_path)
    first.write(name_of(1), chunk_of(1))
    second.write(name_of(2), chunk_of(2))
    np.testing.assert_array_equal(second.read(name_of(1)), chunk_of(1))
    np.testing.assert_array_equal(first.read(name_of(2)), chunk_of(2))
    assert not second.write(name_of(1), chunk_of(1))


def test_only_the_user_may_look_into_what_it_makes(tmp_path: Path):
    tier(tmp_path / "new").write(name_of(1), chunk_of(1))
    made = (tmp_path / "new" / FOLDER).rglob("*")
    for path in (tmp_path / "new" / FOLDER, *made):
        assert path.stat().st_mode & 0o077 == 0, path


def test_another_namespace_finds_nothing(tmp_path: Path):
    tier(tmp_path).write(name_of(1), chunk_of(1))
    other = tier(tmp_path, OTHER)
    assert not other.has(name_of(1))
    with pytest.raises(Unreadable, match="gone"):
        other.read(name_of(1))


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("gone", lambda data: None),
        ("cut", lambda data: data[:-1]),
        ("cut", lambda data: data[: HEADER.size - 1]),
        ("cut", lambda data: b""),
        ("damaged", lambda data: data + b"\0"),
        ("damaged", lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:]),
        ("damaged", lambda data: data[:-1] + bytes([data[-1] ^ 128])),
        ("damaged", lambda data: data[: HEADER.size - 2] + b"\1" + data[HEADER.size - 1 :]),
        ("of another", lambda data: b"CHUNKKV0" + data[8:]),
        ("of another", lambda data: data[:8] + OTHER + data[24:]),
        ("of another", lambda data: data[:24] + name_of(2) + data[40:]),
        ("of another", lambda data: data[:40] + b"\1" + data[41:]),
    ],
)
def test_what_was_changed_is_never_given(tmp_path: Path, reason: str, change):
    one = tier(tmp_path)
    one.write(name_of(1), chunk_of(1))
    [path] = files(tmp_path)
    changed = change(path.read_bytes())
    path.unlink()
    if changed is not None:
        path.write_bytes(changed)
    with pytest.raises(Unreadable) as error:
        one.read(name_of(1))
    assert error.value.reason == reason
    assert not one.has(name_of(1)), "it is not looked for again"
    assert one.write(name_of(1), chunk_of(1)), "it may come again"
    np.testing.assert_array_equal(one.read(name_of(1)), chunk_of(1))


def test_every_flipped_bit_of_a_header_is_seen(tmp_path: Path):
    one = tier(tmp_path)
    one.write(name_of(1), chunk_of(1))
    [path] = files(tmp_path)
    data = path.read_bytes()
    for bit in range(8 * HEADER.size):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(Unreadable):
            one.read(name_of(1))


def test_a_chunk_of_another_size_is_refused(tmp_path: Path):
    tier(tmp_path).write(name_of(1), chunk_of(1))
    for size in (BYTES - 1, BYTES + 1):
        with pytest.raises(Unreadable, match="of another"):
            DiskTier(tmp_path, NAMESPACE, size, PLENTY).read(name_of(1))
        tier(tmp_path).write(name_of(1), chunk_of(1))


def test_those_used_longest_ago_make_room(tmp_path: Path):
    room = 10
    one = tier(tmp_path, limit=room * (BYTES + HEADER.size))
    for number in range(room):
        one.write(name_of(number), chunk_of(number))
        age(one, tmp_path, number, 100 - number)
    one.use([name_of(0), name_of(room + 7)])  # the newest now; and one that is not there
    one.write(name_of(room), chunk_of(room))
    left = {number for number in range(room + 1) if one.has(name_of(number))}
    assert left == {0, *range(3, room + 1)}, "down to nine tenths, and the new one"
    assert one.used_bytes <= room * (BYTES + HEADER.size)
    assert len(files(tmp_path)) == len(left)


def age(one: DiskTier, folder: Path, number: int, seconds: float) -> None:
    [path] = [path for path in files(folder) if path.stem == name_of(number).hex()]
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_all_that_is_in_the_folder_counts(tmp_path: Path):
    limit = 10 * (BYTES + HEADER.size)
    others = tier(tmp_path, OTHER, limit)
    for number in range(10):
        others.write(name_of(number), chunk_of(number))
    one = tier(tmp_path, limit=limit)
    one.write(name_of(1), chunk_of(1))
    assert one.has(name_of(1))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= limit


def test_several_at_once_take_little_more_than_the_limit(tmp_path: Path):
    limit = 64 * (HEADER.size + BYTES)
    several = [tier(tmp_path, limit=limit) for _ in range(4)]
    most = 0
    for number in range(200):
        assert several[number % 4].write(name_of(number), chunk_of(number))
        most = max(most, sum(path.stat().st_size for path in files(tmp_path)))
    assert 0.8 * limit < most <= limit * (1 + 4 / LOOKS)


def test_no_room_for_any_is_no_error(tmp_path: Path):
    one = tier(tmp_path, limit=BYTES)
    assert not one.write(name_of(1), chunk_of(1))
    assert files(tmp_path) == []


def test_what_was_left_unfinished_is_removed_when_it_is_old(tmp_path: Path):
    one = tier(tmp_path)
    one.write(name_of(1), chunk_of(1))
    [path] = files(tmp_path)
    new, old = (path.with_suffix(f".{age}{UNFINISHED}") for age in ("new", "old"))
    for part in (new, old):
        part.write_bytes(b"half of it")
    then = time.time() - ABANDONED_SECONDS - 1
    os.utime(old, (then, then))
    again = tier(tmp_path)
    assert (new.exists(), old.exists()) == (True, False)
    assert len(again) == 1


def test_foreign_files_are_left_alone_and_never_given(tmp_path: Path):
    one = tier(tmp_path)
    one.write(name_of(1), chunk_of(1))
    strange = [files(tmp_path)[0].parent / "strange.kv", tmp_path / FOLDER / "note.txt"]
    for path in strange:
        path.write_text("not a chunk")
    again = tier(tmp_path)
    assert len(again) == 1
    assert all(path.exists() for path in strange)


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path):
    one = tier(tmp_path)
    one.write(name_of(1), chunk_of(1))
    shutil.rmtree(tmp_path / FOLDER)
    with pytest.raises(Unreadable, match="gone"):
        one.read(name_of(1))
    assert one.write(name_of(1), chunk_of(1))
    np.testing.assert_array_equal(one.read(name_of(1)), chunk_of(1))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = tier(tmp_path)

    def fail(self, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            one.write(name_of(1), chunk_of(1))
    assert files(tmp_path) == []
    assert (one.used_bytes, one.has(name_of(1))) == (0, False)


def test_clear_removes_its_own_alone(tmp_path: Path):
    one, other = tier(tmp_path), tier(tmp_path, OTHER)
    one.write(name_of(1), chunk_of(1))
    other.write(name_of(1), chunk_of(2))
    one.clear()
    assert not one.has(name_of(1))
    np.testing.assert_array_equal(other.read(name_of(1)), chunk_of(2))
    assert one.write(name_of(1), chunk_of(1))


WRITER = """
import sys, types
from pathlib import Path
library = types.ModuleType("jax_chunkattn")  # without JAX, which takes seconds to import
library.__path__ = [sys.argv[3]]
sys.modules["jax_chunkattn"] = library
import numpy as np
from jax_chunkattn.tiers.disk import DiskTier
begin, size = int(sys.argv[2]), 1 << 20
one = DiskTier(Path(sys.argv[1]), b"n" * 16, size, 1 << 30)
chunks = [np.random.default_rng(n).integers(0, 256, size, np.uint8) for n in range(4)]
print("ready", flush=True)
for number in range(begin, begin + 1000):
    one.write(number.to_bytes(16, "big"), chunks[number % 4])
    print(number, flush=True)
"""


def kill_a_writer(folder: Path, begin: int, seconds: float) -> int:
    """Kills a process that writes after so long; how many chunks it has said to have written."""
    library = str(Path(jax_chunkattn.__file__).parent)
    command = [sys.executable, "-c", WRITER, str(folder), str(begin), library]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
        time.sleep(seconds)
        writer.send_signal(signal.SIGKILL)
        said = writer.stdout.read().splitlines()
    return sum(line.isdigit() for line in said)


def assert_killed_writers_lose_nothing(folder: Path, times: int) -> None:
    size, draw = 1 << 20, random.Random(0)
    chunks = [chunk_of(number, size) for number in range(4)]
    unfinished = 0
    for time_number in range(times):
        begin = 1000 * time_number
        written = kill_a_writer(folder, begin, draw.uniform(0, 0.02))
        after = DiskTier(folder, NAMESPACE, size, PLENTY)
        for number in range(begin, begin + written):
            np.testing.assert_array_equal(after.read(name_of(number)), chunks[number % 4])
        for path in files(folder):
            if path.suffix == UNFINISHED:
                unfinished += 1
                path.unlink()
                continue
            number = int.from_bytes(bytes.fromhex(path.stem), "big")
            np.testing.assert_array_equal(after.read(name_of(number)), chunks[number % 4])
            path.unlink()
    print(f"{unfinished} of {times} were killed in the midst of a file")
    assert times < 20 or unfinished


def test_a_writer_that_is_killed_loses_what_it_was_writing(tmp_path: Path):
    assert_killed_writers_lose_nothing(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("times", [40, pytest.param(200, marks=pytest.mark.thorough)])
def test_writers_that_are_killed_lose_what_they_were_writing(tmp_path: Path, times: int):
    assert_killed_writers_lose_nothing(tmp_path, times)
