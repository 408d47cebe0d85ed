"""A calibrated codec in a file: safetensors, with what it is in the metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from models.calibration.samples import key_frequencies
from models.decoder import Decoder
from models.errors import CheckpointError
from models.safetensors_file import read_metadata, read_tensors, write_tensors
from models.signature import is_signature_of, signature_of
from pallas_kernels.codecs import ChunkCodec, CodebookCodec, CodecError, HeadConstants

FORMAT = "jax_chunkattn codec 1"


@dataclass(frozen=True)
class StoredCodec:
    """What a file holds.

    Attributes:
      head_dim: of the model that it was made for.
      signature: numbers out of that model's embedding.
    """

    codec: ChunkCodec
    head_dim: int
    signature: Float32[np.ndarray, " signs"]


def write_codec(path: str | Path, codec: ChunkCodec, model: Decoder) -> None:
    """Writes a codec that was fitted to `model`; the file is there as a whole or not at all.

    Raises:
      CodecError: for a codec that needs no calibration.
    """
    described, tensors = {}, {"signature": signature_of(model)}
    for part in ("keys", "values"):
        tensor_codec = getattr(codec, part)
        if not isinstance(tensor_codec, CodebookCodec):
            raise CodecError(f"codec {codec.name!r} is not calibrated: give its name")
        described[part] = dataclasses.asdict(tensor_codec)
        constants = getattr(codec.constants, part)
        tensors |= {f"{part}.{name}": array for name, array in constants.items()}
    metadata = {
        "format": FORMAT,
        "name": codec.name,
        "head_dim": str(model.cache_spec.head_dim),
        "codec": json.dumps(described),
    }
    write_tensors(Path(path), tensors, metadata)


def load_codec(path: str | Path, model: Decoder) -> ChunkCodec:
    """The codec of a file that was calibrated for this model, whatever its dtype.

    Raises:
      CodecError: when it was calibrated for another, or the file cannot be used.
    """
    stored, spec = read_codec(path), model.cache_spec
    heads = stored.codec.constants.heads
    made_for = *(heads or ()), stored.head_dim
    if made_for != (spec.num_layers, spec.num_kv_heads, spec.head_dim):
        raise CodecError(
            f"{path} was calibrated for another model: its layers, KV heads and head_dim are "
            f"{made_for}, and this one's {(spec.num_layers, spec.num_kv_heads, spec.head_dim)}"
        )
    if not is_signature_of(stored.signature, model):
        raise CodecError(
            f"{path} was calibrated for another model of the same sizes: its embedding is another"
        )
    turning = stored.codec.constants.keys.get("frequencies")
    if turning is not None and not _same_rotation(turning, key_frequencies(model.config)):
        raise CodecError(
            f"{path} was calibrated for another model: keys are rotated otherwise, as they are "
            "with other --max-positions where those choose how positions are stretched"
        )
    return stored.codec


def _same_rotation(stored: np.ndarray, frequencies: np.ndarray) -> bool:
    """Of `[L, Hkv, pairs]` and `[L, pairs]`."""
    return stored.shape[2] == frequencies.shape[1] and np.allclose(
        stored, frequencies[:, None], rtol=1e-5, atol=0
    )


def read_codec(path: str | Path) -> StoredCodec:
    """What a file holds, whatever model it was made for.

    Raises:
      CodecError: when it is not there, is no file of `write_codec`, or is not whole.
    """
    try:
        metadata = read_metadata(Path(path))
        if metadata.get("format") != FORMAT:
            raise CodecError(f"{path} is no codec: its format is not {FORMAT!r}")
        tensors = {}
        for name, tensor in read_tensors(Path(path)).items():
            with tensor.values() as values:
                tensors[name] = np.array(values, np.float32)
        return _stored(metadata, tensors)
    except CodecError:
        raise
    except (OSError, CheckpointError) as error:
        raise CodecError(f"no codec can be read from {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise CodecError(f"{path} is no codec that was written whole: {error}") from error


def _stored(metadata: Mapping[str, str], tensors: dict[str, np.ndarray]) -> StoredCodec:
    head_dim, described = int(metadata["head_dim"]), json.loads(metadata["codec"])
    signature = tensors.pop("signature")
    parts, constants = {}, {}
    for part in ("keys", "values"):
        parts[part] = CodebookCodec(**described[part])
        begin = f"{part}."
        constants[part] = {
            name.removeprefix(begin): array
            for name, array in tensors.items()
            if name.startswith(begin)
        }
    [outer] = {array.shape[:2] for array in tensors.values()}
    for part, codec in parts.items():
        sizes = codec.constants(head_dim)
        found = {name: array.shape for name, array in constants[part].items()}
        pairs = found.get("frequencies", (0, 0, 0))[-1]
        expected = {name: (*outer, pairs if size is None else size) for name, size in sizes.items()}
        if found != expected or 2 * pairs > head_dim:
            raise ValueError(f"its constants of {part} have shapes {found}, not {expected}")
        if not all(np.isfinite(array).all() for array in constants[part].values()):
            raise ValueError(f"constants of {part} are not finite")
    codec = ChunkCodec(metadata["name"], **parts, constants=HeadConstants.of(**constants))
    return StoredCodec(codec, head_dim, signature)
