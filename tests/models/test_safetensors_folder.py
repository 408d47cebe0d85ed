"""Reading checkpoint folders: good ones, incomplete ones, damaged files, and how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from models.errors import CheckpointError
from models.gguf_file import read_gguf
from models.safetensors_folder import INDEX, SafetensorsFolder, read_folder, read_json
from models.tensors import Tensors
from tests.models.safetensors_writer import (
    header_of,
    write_index,
    write_raw,
    write_safetensors,
    write_sharded,
)
from tests.models.tiny_checkpoint import write_checkpoint

RANDOM = np.random.default_rng(0)
TENSORS = {
    "a": RANDOM.normal(size=(3, 5)).astype(np.float32),
    "b": RANDOM.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "c": RANDOM.normal(size=(2, 3, 4)).astype(np.float16),
    "d": RANDOM.normal(size=(2, 2)),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 4), np.float32),
}
SHARDS = {
    "model-00001-of-00002.safetensors": {"a": TENSORS["a"], "b": TENSORS["b"]},
    "model-00002-of-00002.safetensors": {"c": TENSORS["c"]},
}


def read_all(checkpoint: Tensors) -> dict[str, np.ndarray]:
    found = {}
    for name in checkpoint.shapes:
        with checkpoint.tensor(name) as values:
            found[name] = values.copy()
    return found


def assert_holds(checkpoint: SafetensorsFolder, tensors: dict[str, np.ndarray]) -> None:
    found = read_all(checkpoint)
    assert list(found) == list(tensors)
    for name, expected in tensors.items():
        assert found[name].dtype == expected.dtype
        assert checkpoint.shapes[name] == expected.shape
        np.testing.assert_array_equal(found[name], expected)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in tensors.values())


def refusal(path: Path, named: Path | None = None) -> str:
    """The one line with which the checkpoint is refused; it begins with what it is about."""
    with pytest.raises(CheckpointError) as caught:
        read_folder(path)
    message = str(caught.value)
    assert message.startswith(f"{named or path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("padding", range(4))
def test_values_come_in_the_dtype_stored_wherever_they_lie(tmp_path, padding):
    write_safetensors(tmp_path / "model.safetensors", TENSORS, padding=padding)
    checkpoint = read_folder(tmp_path)
    assert checkpoint.path == tmp_path
    assert_holds(checkpoint, TENSORS)


def test_a_tensor_beyond_the_first_pages_is_found(tmp_path):
    tensors = {"large": np.arange(100_001, dtype=np.float32), "b": TENSORS["b"], "a": TENSORS["a"]}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert_holds(read_folder(tmp_path), tensors)


def test_values_are_read_only_and_outlive_the_context(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    with read_folder(tmp_path).tensor("a") as values:
        assert not values.flags.writeable
    np.testing.assert_array_equal(values, TENSORS["a"])


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.safetensors"])
def test_one_file_is_a_checkpoint_and_so_is_its_folder(tmp_path, name):
    path = write_safetensors(tmp_path / name, TENSORS)
    for spec in (path, tmp_path, str(tmp_path)):
        checkpoint = read_folder(spec)
        assert checkpoint.path == tmp_path
        assert_holds(checkpoint, TENSORS)


def test_shards_are_one_checkpoint_and_each_stands_for_it(tmp_path):
    write_sharded(tmp_path, SHARDS)
    expected = {name: TENSORS[name] for name in "abc"}
    assert_holds(read_folder(tmp_path), expected)
    assert_holds(read_folder(tmp_path / "model-00002-of-00002.safetensors"), expected)


def test_other_safetensors_beside_the_model_are_left_alone(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    write_safetensors(tmp_path / "consolidated.safetensors", {"other": TENSORS["a"]})
    assert_holds(read_folder(tmp_path), TENSORS)
    write_sharded(tmp_path / "sharded", SHARDS)
    write_safetensors(tmp_path / "sharded" / "consolidated.safetensors", {"other": TENSORS["a"]})
    assert set(read_folder(tmp_path / "sharded").shapes) == {"a", "b", "c"}


def test_a_gguf_file_is_read_the_same_way(tmp_path):
    checkpoint = read_gguf(write_checkpoint(tmp_path / "tiny.gguf"))
    found = read_all(checkpoint)
    assert {name: values.shape for name, values in found.items()} == checkpoint.shapes
    for name, tensor in checkpoint.tensors.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name].reshape(-1), tensor.data.view(np.float32))
    assert checkpoint.total_bytes == sum(values.nbytes for values in found.values())


def test_nothing_at_the_path_is_said_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: .*absent"):
        read_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no weights", "model.safetensors", "no files at all"]),
        (["config.json", "README.md"], ["no weights", "it has README.md, config.json"]),
        (["pytorch_model.bin"], ["only pytorch_model.bin", "never loaded", "convert with"]),
        (["consolidated.00.pth", "x.pt"], ["only consolidated.00.pth, x.pt", "never loaded"]),
        (["m.Q4_1.gguf"], ["GGUF", "m.Q4_1.gguf"]),
        (
            ["a.safetensors", "b.safetensors"],
            ["2 safetensors files (a.safetensors, b.safetensors)"],
        ),
        (["model-00001-of-00004.safetensors"], ["1 shard of", f"no {INDEX}"]),
        ([f"model-0000{i}-of-00004.safetensors" for i in (1, 2)], ["2 shards of", f"no {INDEX}"]),
    ],
    ids=lambda value: ",".join(value)[:30],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path, files, words):
    for name in files:
        (tmp_path / name).write_bytes(b"anything")
    message = refusal(tmp_path)
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_the_path_of_a_pickle_is_refused_unopened(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert "pickled weights are never loaded" in refusal(tmp_path / name)


def test_missing_shards_are_counted_and_named(tmp_path):
    write_sharded(tmp_path, SHARDS)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    message = refusal(tmp_path, tmp_path / INDEX)
    assert "only 1 of 2 shards are there" in message
    assert message.endswith(": model-00002-of-00002.safetensors")


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_sharded(tmp_path, SHARDS)
    write_index(tmp_path, dict.fromkeys("abc", "model-00001-of-00002.safetensors"))
    message = refusal(tmp_path, tmp_path / "model-00001-of-00002.safetensors")
    assert "says it holds: c;" in message


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({}, "no weight_map"),
        (["a"], "no weight_map"),
        ({"a": 5}, "tensor a is in 5"),
        ({"a": "../model.safetensors"}, "no file name"),
        ({"a": "/model.safetensors"}, "no file name"),
        ({"a": ""}, "no file name"),
    ],
    ids=str,
)
def test_a_strange_index_is_refused(tmp_path, weight_map, words):
    write_safetensors(tmp_path.parent / "model.safetensors", TENSORS)
    write_index(tmp_path, weight_map)
    assert words in refusal(tmp_path, tmp_path / INDEX)


def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]} | changes


@pytest.mark.parametrize(
    ("a", "words"),
    [
        (None, "tensor b does not follow on"),
        (entry(data_offsets=[4, 64]), "corrupt header"),
        (entry(shape=[3, 4], data_offsets=[0, 48]), "tensor b does not follow on"),
        (entry(shape=[3, 4]), "F32 of shape (3, 4) and has 60 bytes"),
        (entry(shape=[15, -1]), "entry of tensor a makes no sense"),
        (entry(shape=[True, 15]), "entry of tensor a makes no sense"),
        (entry(shape=[15.0]), "entry of tensor a makes no sense"),
        (entry(shape="15"), "entry of tensor a makes no sense"),
        (entry(shape=5), "entry of tensor a makes no sense"),
        (entry(dtype=["F32"]), "entry of tensor a makes no sense"),
        (entry(data_offsets=[60, 0]), "has -60 bytes"),
        (entry(data_offsets=[0]), "entry of tensor a makes no sense"),
        (entry(data_offsets=[0, 2**70], shape=[2**68]), "truncated"),
        (entry(data_offsets=[0, 2**101]), "entry of tensor a makes no sense"),
        (entry(shape=[2**101, 2**101]), "entry of tensor a makes no sense"),
        (entry(shape=[15] + [1] * 64), "entry of tensor a makes no sense"),
        (entry(data_offsets=[0, 0], shape=[0, 2**63]), "entry of tensor a makes no sense"),
        ({"dtype": "F32"}, "entry of tensor a makes no sense"),
        ([1], "entry of tensor a makes no sense"),
        (entry(dtype="F8_E4M3"), "tensor a is stored as F8_E4M3"),
        (entry(dtype="F4"), "such as FP8 are not supported"),
    ],
    ids=str,
)
def test_a_header_that_contradicts_the_file_is_refused(tmp_path, a, words):
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS, a=a)
    assert words in refusal(tmp_path, path)


def test_overlapping_tensors_and_left_over_bytes_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": TENSORS["a"], "z": TENSORS["a"]}, z=entry())
    assert "tensor z overlaps" in refusal(tmp_path, path)
    path.write_bytes(write_safetensors(path, TENSORS).read_bytes() + b"more")
    assert "4 bytes belong to no tensor" in refusal(tmp_path, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"\x10\0\0", "truncated"),
        (b"\x10\0\0\0\0\0\0\0{", "truncated: it has 9 bytes, and its header alone needs 24"),
        (b"PK\x03\x04 a zip file, of some length", "not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
    ],
    ids=["empty", "short", "cut header", "zip", "lfs"],
)
def test_other_content_is_named(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert words in refusal(tmp_path, path)


@pytest.mark.parametrize(
    "header", [b"{", b"\xff\xfe", b"[]", b'{"a": 1, "a": 2}', b'{"a":' * 5000], ids=len
)
def test_a_header_that_is_no_object_is_refused(tmp_path, header):
    path = write_raw(tmp_path / "model.safetensors", header, b"")
    assert "not a safetensors file" in refusal(tmp_path, path)


def test_a_header_over_the_limit_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    assert "100000001 bytes, and 100000000 is the limit" in refusal(tmp_path, path)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        assert "truncated" in refusal(tmp_path, path), cut


def test_a_file_cut_after_its_header_was_read_is_noticed(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    checkpoint = read_folder(tmp_path)
    path.write_bytes(path.read_bytes()[:20])
    with (
        pytest.raises(CheckpointError, match="the file has changed since it was opened"),
        checkpoint.tensor("a"),
    ):
        pass


def test_a_damaged_header_is_refused_or_read_but_never_crashes(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors", TENSORS)
    whole, refused = path.read_bytes(), 0
    header_end = 8 + len(json.dumps(header_of(TENSORS)))
    for _ in range(300):
        damaged = bytearray(whole)
        for position in RANDOM.integers(8, header_end, 2):
            damaged[position] = RANDOM.integers(32, 127)
        path.write_bytes(damaged)
        try:
            read_all(read_folder(tmp_path))
        except CheckpointError:
            refused += 1
    assert refused > 200


def test_integer_buffers_are_listed_and_refused_when_asked_for(tmp_path):
    tensors = TENSORS | {"positions": np.arange(4), "mask": np.array([True])}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    checkpoint = read_folder(tmp_path)
    assert checkpoint.shapes["positions"] == (4,)
    with pytest.raises(CheckpointError, match="tensor mask is stored as BOOL; only F64"):
        checkpoint.tensor("mask").__enter__()


def test_json_is_read_as_an_object_or_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"hidden_size": 5}')
    assert read_json(path) == {"hidden_size": 5}
    for content, words in [
        (b"[1]", "expected a JSON object, got list"),
        (b'{"a": ', "not JSON"),
        (b"\xff\xff{}", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            read_json(path)
        assert str(path) in str(caught.value)
    with pytest.raises(CheckpointError, match=r"absent\.json: No such file"):
        read_json(tmp_path / "absent.json")


PEAK = """
import sys
import gguf, numpy as np
from models.gguf_file import read_gguf
from models.safetensors_folder import read_folder

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kilobytes("VmRSS")
checkpoint = (read_gguf if sys.argv[1].endswith("gguf") else read_folder)(sys.argv[1])
for name in checkpoint.shapes:
    with checkpoint.tensor(name) as values:
        values.view(np.uint16).max()
        del values  # the name would keep a dequantised tensor while the next is made
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_memory_grows_by_the_largest_tensor_only(tmp_path, kind):
    """Six tensors of 16 MiB: 96 MiB in all, and 32 with two of them at a time."""
    tensors = {f"t{i}": np.full((1 << 11, 1 << 11), i, np.float32) for i in range(6)}
    if kind == "folder":
        shards = [dict(list(tensors.items())[i : i + 3]) for i in (0, 3)]
        path = write_sharded(tmp_path, dict(zip(SHARDS, shards, strict=True)))
    else:
        path = write_checkpoint(tmp_path / "six.gguf", tensors=tensors)
    finished = subprocess.run(
        [sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=True
    )
    assert 15 << 10 < int(finished.stdout) < 27 << 10
