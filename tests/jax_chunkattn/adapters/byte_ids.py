"""The toy model's tokenizer with the ids that tunix asks for."""

from __future__ import annotations

from tests.jax_chunkattn.engine.engines import BytePairs


class ByteIds(BytePairs):
    """Its ids are bytes: 0 is padding, and a newline ends an answer."""

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return 10

    def pad_id(self) -> int:
        return 0
