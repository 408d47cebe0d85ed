"""What was measured of each layer of a model, as integers in a file.

A JSON object: the integers, under a name; numbers out of the embedding of the model that they were
measured on; and whatever else its writer tells.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from models.decoder import Decoder
from models.errors import LayerFileError
from models.signature import is_signature_of, signature_of
from models.sizes import is_size, shown
from models.whole_files import write_whole

_SIGNATURE, _NUMBERS = "embedding_signature", 64


@dataclass(frozen=True)
class StoredLayers:
    """What a file holds."""

    values: tuple[int, ...]
    signature: Float32[np.ndarray, " numbers"]


@dataclass(frozen=True)
class LayerFile:
    """A kind of such files.

    Attributes:
      name: of the integers in the file.
      what: they are, in words.
      values: the smallest and the largest of them.
    """

    name: str
    what: str
    values: range

    def write(
        self, path: str | Path, values: Sequence[int], model: Decoder, about: Mapping[str, Any]
    ) -> None:
        """Writes what was measured on `model`, and what else is known `about` it."""
        signature = [float(f"{one:.6g}") for one in signature_of(model, _NUMBERS)]
        content = {**about, self.name: list(values), _SIGNATURE: signature}
        write_whole(Path(path), json.dumps(content, indent=1) + "\n")

    def load(self, path: str | Path, model: Decoder) -> tuple[int, ...]:
        """Those of a file.

        Raises:
          LayerFileError: when they were measured on another model, or the file cannot be used.
        """
        stored = self.read(path)
        if not is_signature_of(stored.signature, model, _NUMBERS):
            raise LayerFileError(
                f"{path}: the {self.what} were measured on another model: its embedding is another"
            )
        return stored.values

    def read(self, path: str | Path) -> StoredLayers:
        """What a file holds, whatever model it is of.

        Raises:
          LayerFileError: when it is not there, or is not of this kind.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise LayerFileError(
                f"no {self.what} can be read from {path} ({error.strerror or error})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise LayerFileError(f"{path} has no {self.what}: {error}") from error
        values = content.get(self.name) if isinstance(content, dict) else None
        least, most = self.values[0], self.values[-1]
        if not isinstance(values, list) or not all(
            is_size(one, least=least, most=most) for one in values
        ):
            raise LayerFileError(
                f"{path}: {self.name} must be a list of {self.what} from {least}, got "
                f"{shown(values)}"
            )
        try:
            signature = np.array(content.get(_SIGNATURE), np.float32)
        except (TypeError, ValueError):
            signature = np.array([])
        if signature.ndim != 1 or not signature.size or not np.isfinite(signature).all():
            raise LayerFileError(f"{path}: {_SIGNATURE} must be a list of numbers")
        return StoredLayers(tuple(values), signature)
