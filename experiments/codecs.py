"""The option `--codec`: the name of a codec, or a file that `experiments calibrate` has written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from experiments.harness.errors import UserError

if TYPE_CHECKING:
    from models import Decoder
    from pallas_kernels.codecs import ChunkCodec

SUFFIX = ".safetensors"
"""Of a file with a codec."""

CODECS = "{identity,int8,int4,int2,int4/int2,fp8,fp8_e5m2,FILE}"
"""How codecs are shown."""

CodecName = Annotated[
    str,
    tyro.conf.arg(
        metavar=CODECS,
        help="How full chunks of the KV cache are stored, keys/values if they differ; FILE is one "
        "that `calibrate` has written for the model.",
    ),
]
"""The option `--codec` of all that run an engine; see `pallas_kernels.codecs`."""


def check_used_codec(name: str) -> None:
    """Raise `UserError` or `CodecError` for a `--codec` that there is none of; say on standard
    error what a model that uses it must expect, if it is much."""
    check_codec(name)
    if name == "int2":
        print(
            "warning: with keys of 2 bits answers are much worse (SmolLM2's perplexity by 65%); "
            "int4/int2 has values of 2 bits alone",
            file=sys.stderr,
        )


def check_codec(name: str, *, chunk_size: int | None = None, head_dim: int | None = None) -> None:
    """Raise `UserError` or `CodecError` for a `--codec` that there is none of, or that cannot store
    chunks of these sizes, if they are given."""
    codec = codec_named(name)
    if codec is not None and chunk_size is not None and head_dim is not None:
        codec.check(chunk_size, head_dim)


def codec_named(name: str) -> ChunkCodec | None:
    """The codec of a `--codec`, whatever model a file is for; None where there is none."""
    if is_file(name):
        from models.calibration import read_codec  # and JAX, which --help can do without

        return read_codec(name).codec
    from pallas_kernels.codecs import codec_of

    if name.startswith("nuq"):
        raise UserError(
            f"--codec {name} is calibrated to a model: `python -m experiments calibrate --codec "
            f"{name}` writes a file; give its path"
        )
    return codec_of(name)


def codec_for(name: str, model: Decoder) -> str | ChunkCodec:
    """What `CacheConfig` takes for a `--codec`.

    Raises:
        CodecError: a file is for another model.
    """
    if not is_file(name):
        return name
    from models.calibration import load_codec

    return load_codec(name, model)


def is_file(name: str) -> bool:
    """Whether a `--codec` names a file."""
    return name.endswith(SUFFIX) or Path(name).is_file()
