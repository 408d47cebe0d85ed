"""Which KV heads keep all tokens: DuoAttention (Xiao et al., arXiv 2410.10819).

A few heads find what stood long ago; those are retrieval heads. The others attend to the first few
tokens and to the last: streaming heads (section 2.2). A score tells how much of a retrieval head
each KV head is, and a share how many of them there shall be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float

from jax_chunkattn.device.model_interface import CacheSpec
from models.decoder import Decoder
from models.errors import HeadPatternError
from pallas_kernels.windows import Window, WindowMap

SINKS, RECENT = 64, 256
"""What streaming heads see in the paper's evaluation (section 3.1), in tokens."""


@dataclass(frozen=True)
class HeadPattern:
    """A score of each KV head, and what those see that do not keep all tokens.

    Attributes:
      scores: for each layer, for each KV head, in [0, 1]: the higher, the more its tokens of long
        ago are needed. A published pattern's are its gates.
      sinks: how many of the first tokens a streaming head sees.
      recent: how many of the last it sees, the query's own among them.

    Raises:
      HeadPatternError: for scores that are not such a table, or sizes that are no window's.
    """

    scores: tuple[tuple[float, ...], ...]
    sinks: int = SINKS
    recent: int = RECENT

    def __post_init__(self) -> None:
        widths = {len(layer) for layer in self.scores}
        if len(widths) != 1 or widths == {0}:
            raise HeadPatternError("scores are needed for as many KV heads in every layer")
        wrong = [one for layer in self.scores for one in layer if not 0 <= one <= 1]
        if wrong:
            raise HeadPatternError(f"scores must be numbers from 0 to 1, got {wrong[0]}")
        if self.sinks < 0 or self.recent < 1:
            raise HeadPatternError(
                f"streaming heads see 0 first tokens or more and 1 last one or more, got "
                f"{self.sinks} and {self.recent}"
            )

    @classmethod
    def of(
        cls,
        scores: Float[np.ndarray, "L Hkv"] | Sequence[Sequence[float]],
        sinks: int = SINKS,
        recent: int = RECENT,
    ) -> HeadPattern:
        """Of an array; raises as the class does."""
        table = tuple(tuple(float(one) for one in layer) for layer in scores)
        return cls(table, sinks, recent)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and KV heads."""
        return len(self.scores), len(self.scores[0])

    def retrieval_heads(self, share: float) -> Bool[np.ndarray, "L Hkv"]:
        """The heads that keep all tokens when this share of them shall.

        As published: those whose score is at least the quantile of `1 - share`. Where scores are
        equal at the quantile, those of earlier layers, and then the first of a layer, are taken,
        so that the share is kept and the same at every time.

        Raises:
          HeadPatternError: for a share that is not in [0, 1].
        """
        everything = np.ones(self.shape, np.bool_)
        return self._best(share, everything)

    def windows(self, spec: CacheSpec, share: float) -> WindowMap | None:
        """What the heads of a model see when this share of those that see all tokens go on to.

        Heads that have a window without a pattern, as in models with sliding windows, keep it, and
        are not counted.

        Raises:
          HeadPatternError: for a share that is not in [0, 1], or a model with other heads.
        """
        self.check_shape(spec)
        own = spec.windows_of_heads
        unlimited = np.array([[window is None for window in layer] for layer in own])
        streaming = unlimited & ~self._best(share, unlimited)
        window = Window(self.recent, self.sinks)
        heads = [
            [window if streams else mine for streams, mine in zip(*layer, strict=True)]
            for layer in zip(streaming.tolist(), own, strict=True)
        ]
        return WindowMap.of(heads)

    def check_shape(self, spec: CacheSpec) -> None:
        """Raises HeadPatternError for a model of other layers or KV heads."""
        model = spec.num_layers, spec.num_kv_heads
        if self.shape != model:
            raise HeadPatternError(
                "the pattern is for another model: it is of {} layers of {} KV heads, and the "
                "model has {} of {}".format(*self.shape, *model)
            )

    def _best(self, share: float, among: Bool[np.ndarray, "L Hkv"]) -> Bool[np.ndarray, "L Hkv"]:
        if not 0 <= share <= 1:
            raise HeadPatternError(f"a share of the heads is from 0 to 1, got {share}")
        places = np.flatnonzero(among)
        count = _at_least_quantile(len(places), share)
        falling = np.argsort(-np.array(self.scores).ravel()[places], kind="stable")
        best = np.zeros(among.size, np.bool_)
        best[places[falling[:count]]] = True
        return best.reshape(among.shape)


def _at_least_quantile(count: int, share: float) -> int:
    """How many of `count` different numbers are at least their quantile of `1 - share`."""
    if share in (0, 1):
        return round(share * count)
    below = (1 - share) * (count - 1)
    return count - math.ceil(round(below, 9))  # 0.3 of 10 is not 3.0000000000000004


def with_pattern(model: Decoder, pattern: HeadPattern, share: float) -> Decoder:
    """A decoder of the same weights, which are not copied, whose heads see what a pattern lets
    them (`HeadPattern.windows`). With a share of 1 it computes what `model` does.

    Raises:
      HeadPatternError: as `HeadPattern.windows`.
    """
    spec = replace(model.cache_spec, windows=pattern.windows(model.cache_spec, share))
    streaming = nnx.merge(*nnx.split(model))
    streaming.cache_spec = spec
    return streaming
