"""The compiled kernel's library: how it is built, found again, and done without."""

from __future__ import annotations

import stat
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_chunkattn.planning.workloads import case_inputs
from pallas_kernels import chunk_attention
from pallas_kernels.cache_folder import CACHE_VARIABLE
from pallas_kernels.chunk_attention import CHUNK_ATTENTION
from pallas_kernels.codecs import CodebookCodec, codec_of
from pallas_kernels.codecs.chunk_codec import ChunkCodec
from pallas_kernels.implementations import AttentionShapes, ImplementationError, check_device
from pallas_kernels.native import build, library, operands
from pallas_kernels.native.build import BuildError
from pallas_kernels.specs import AttentionCase
from pallas_kernels.targets import H200, use_target
from tests.interpreted import skip_unless_there

SHAPES = AttentionShapes("float32", 1, 64, 64)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache in which nothing is built."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "native"


def compiler_that(folder: Path, does: str, name: str = "compiler") -> str:
    """A program in place of a compiler, that tells its version."""
    program = folder / name
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo compiler 1 && exit\n{does}\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


WRITES_ITS_OUTPUT = """
echo >> "$0.runs"
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


def test_a_library_is_built_once(cache, monkeypatch, tmp_path):
    compiler = compiler_that(tmp_path, WRITES_ITS_OUTPUT)
    monkeypatch.setenv("CXX", compiler)
    first, again = build.build(), build.build()
    assert first == again
    assert first.parent == cache
    assert first.read_text() == "library\n"
    assert Path(f"{compiler}.runs").read_text().count("\n") == 1
    assert {path.suffix for path in cache.iterdir()} == {".so", ".lock"}


def test_another_compiler_or_processor_is_another_library(cache, monkeypatch, tmp_path):
    found = []
    for name in ("one", "other"):
        monkeypatch.setenv("CXX", compiler_that(tmp_path, WRITES_ITS_OUTPUT, name))
        found.append(build.build())
    monkeypatch.setattr(build, "_processor", lambda: "one that is not here")
    found.append(build.build())
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("echo 'kernel.cc:1: error: no such thing' >&2; exit 1", "failed: kernel.cc:1: error: no"),
        ("exit 3", "failed: status 3"),
    ],
)
def test_a_compiler_that_fails_says_why(cache, monkeypatch, tmp_path, does, message):
    monkeypatch.setenv("CXX", compiler_that(tmp_path, does))
    with pytest.raises(BuildError, match=message):
        build.build()
    assert not list(cache.glob("*.so"))


def test_no_compiler_is_said(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-compiler")
    with pytest.raises(BuildError, match=r"no compiler 'no-compiler', which \$CXX names"):
        build.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="there is no C\\+\\+ compiler: none of g"):
        build.build()


def test_a_cache_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setenv("CXX", compiler_that(tmp_path, WRITES_ITS_OUTPUT))
    with pytest.raises(BuildError, match="file/native cannot be written: "):
        build.build()


def test_without_it_xla_is_the_best_and_who_asks_for_it_is_told_why(monkeypatch):
    monkeypatch.setattr(library, "_load", lambda: "there is no C++ compiler")
    assert CHUNK_ATTENTION.resolve(None, SHAPES) == "xla"
    with pytest.raises(ImplementationError, match="'native' cannot run: there is no C\\+\\+"):
        CHUNK_ATTENTION.resolve("native", SHAPES)
    with pytest.raises(ImplementationError, match="there is no C\\+\\+ compiler"):
        check_device("native")


def test_it_is_for_cpus():
    with use_target(H200), pytest.raises(ImplementationError, match="for CPUs, and the device is"):
        check_device("native")


def test_what_it_reads_and_what_not():
    int4 = codec_of("int4")
    assert int4 is not None
    codebook = ChunkCodec("nuq4", CodebookCodec(4, "tokens"), int4.values)
    assert operands.unsupported(SHAPES) is None
    assert operands.unsupported(AttentionShapes("float32", 1, 64, 64, int4)) is None
    for shapes, reason in (
        (AttentionShapes("float64", 1, 64, 64), "not float64"),
        (AttentionShapes("float32", 1, 64, 64, codebook), "does not read nuq4"),
        (AttentionShapes("float32", 1, 64, 64, clustered=True), "no clustered heads"),
    ):
        assert reason in str(operands.unsupported(shapes))
        assert CHUNK_ATTENTION.resolve(None, shapes) == "xla"


def test_it_may_be_mapped_over_queries():
    skip_unless_there("native")
    inputs = case_inputs(AttentionCase("1,3_32,16", 4, 2, 16, chunk_size=16))
    rest = inputs.keys, inputs.values, inputs.plan, inputs.lengths
    queries = np.stack([inputs.q, -inputs.q])

    def attend(q):
        return chunk_attention(q, *rest, implementation="native")

    each = np.stack([attend(q) for q in queries])
    np.testing.assert_array_equal(jax.vmap(attend)(queries), each)


def test_operands_that_are_not_expected_are_an_error_and_no_crash():
    """Which no caller can bring about but one with another version of the sources."""
    skip_unless_there("native")
    output = jax.ShapeDtypeStruct((1, 1, 8), np.float32)
    numbers = {"scale": np.float32(1), "softcap": np.float32(0), "codes": np.zeros(0, np.int64)}
    how = {**numbers, "batch_invariant": False}
    few = [np.zeros((1, 1, 8), np.float32), np.zeros(0, np.int32)]
    with pytest.raises(Exception, match="fewer operands than expected"):
        jax.block_until_ready(library.call(library.DECODE, few, output, **how))
    wrong = [np.zeros((1, 1, 8), np.int32)]
    with pytest.raises(Exception, match="another type than expected"):
        jax.block_until_ready(library.call(library.DECODE, wrong, output, **how))
