"""Windows: layers or heads whose queries see the last tokens only, and the first few.

A window is by absolute position, so what a query sees depends on nothing else. Sliding-window
layers (Beltagy et al., arXiv 2004.05150, section 3.1; Mistral 7B, arXiv 2310.06825, section 2) have
no sinks; streaming heads (Xiao et al., arXiv 2309.17453, section 3; DuoAttention, arXiv 2410.10819,
section 3) do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FAR = 1 << 29
"""More tokens than any sequence has."""


@dataclass(frozen=True)
class Window:
    """What a query sees: itself and the `size - 1` tokens before it, and the first `sinks` of all.

    Raises:
      ValueError: for a size below 1, or sinks below 0.
    """

    size: int
    sinks: int = 0

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"a window has at least a token, not {self.size}")
        if self.sinks < 0:
            raise ValueError(f"sinks are no tokens or more, not {self.sinks}")


EVERYTHING = Window(FAR)
"""What a query sees that has no window."""


@dataclass(frozen=True)
class WindowMap:
    """The window of each KV head of each layer.

    Attributes:
      windows: all that there are, each once; None where a query sees all tokens before it.
      of_heads: for each layer, for each KV head, which of them: an index.
    """

    windows: tuple[Window | None, ...]
    of_heads: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, heads: Sequence[Sequence[Window | None]]) -> WindowMap | None:
        """Of the window of each KV head of each layer; None if none has any."""
        windows = tuple(dict.fromkeys(window for layer in heads for window in layer))
        if not any(windows):
            return None
        return cls(windows, tuple(tuple(map(windows.index, layer)) for layer in heads))

    @classmethod
    def of_layers(cls, layers: Sequence[Window | None], kv_heads: int) -> WindowMap | None:
        """Of layers whose heads have one window; None if none has any."""
        return cls.of([[window] * kv_heads for window in layers])
