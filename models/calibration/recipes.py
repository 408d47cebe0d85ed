"""What can be calibrated: KVQuant's codec, and the steps that lead to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pallas_kernels.codecs import CodebookCodec, CodecError

OUTLIERS = 0.01


@dataclass(frozen=True)
class Recipe:
    """A codec without the constants of a model.

    Attributes:
      name: as the codec will be called.
      fitted: whether entries of codebooks are fitted; else they are evenly spaced.
    """

    name: str
    keys: CodebookCodec
    values: CodebookCodec
    fitted: bool = True


def recipe_of(name: str, outliers: float = OUTLIERS) -> Recipe:
    """The recipe of a name: "nuq4", "nuq3", "nuq2", or two of these for keys and values, as in
    "nuq4/nuq3" (arXiv 2401.18079, section 4).

    Args:
      outliers: share of a chunk's numbers that are stored as they are.

    Raises:
      CodecError: for another name.
      ValueError: for a share that is not in [0, 1).
    """
    parts = name.split("/")
    if len(parts) > 2 or not _BITS.keys() >= set(parts):
        raise CodecError(f"unknown codec {name!r}; to be calibrated: {', '.join(_BITS)}, nuq4/nuq3")
    full_name = f"{name}-{100 * outliers:g}%" if outliers else name
    return Recipe(
        full_name,
        CodebookCodec(_BITS[parts[0]], "tokens", outliers, before_rotation=True),
        CodebookCodec(_BITS[parts[-1]], "channels", outliers),
    )


def ladder(bits: int) -> Iterator[Recipe]:
    """The steps from rounding each token's numbers to `recipe_of`, each with all before it."""
    plain = CodebookCodec(bits, "channels", outliers=0, first_exact=False)
    step = Recipe(f"{bits} bits, by token", plain, plain, fitted=False)
    yield step
    step = replace(step, name="keys by channel", keys=replace(plain, along="tokens"))
    yield step
    keys, values = (replace(part, first_exact=True) for part in (step.keys, step.values))
    step = replace(step, name="first token exact", keys=keys, values=values)
    yield step
    step = replace(step, name="keys before rotation", keys=replace(keys, before_rotation=True))
    yield step
    yield replace(step, name="fitted codebooks", fitted=True)
    yield replace(recipe_of(f"nuq{bits}"), name="1% outliers")


_BITS = {"nuq4": 4, "nuq3": 3, "nuq2": 2}
