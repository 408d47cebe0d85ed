"""The picture of a run: tokens per second and KV bytes, shared and not."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.decoding import Measured

# Blue and orange of Okabe and Ito's palette: told apart by colour-blind readers; the hatch tells
# them apart in a grey print.
_SHARED = {"color": "#0072B2", "edgecolor": "black", "linewidth": 0.6}
_UNSHARED = {"color": "#E69F00", "edgecolor": "black", "linewidth": 0.6, "hatch": "//"}
_MEBIBYTE = 1 << 20


def draw_comparison(path: Path, title: str, run: Measured, unshared: Measured | None) -> None:
    """Write `comparison_figure` as a PNG."""
    comparison_figure(title, run, unshared).savefig(path)


def comparison_figure(title: str, run: Measured, unshared: Measured | None) -> Figure:
    """Two panels: decode rate, and KV memory of the run's own batch."""
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    rate, memory = figure.subplots(1, 2)
    figure.suptitle(title)

    _panel(
        rate,
        "Decoding",
        "tokens per second",
        run.decode_tokens_per_second,
        unshared.decode_tokens_per_second if unshared else None,
        (_name(run), _name(unshared) if unshared else "without sharing\n(not run)"),
    )
    _panel(
        memory,
        f"KV cache, batch {run.batch}",
        "MiB",
        run.kv_bytes_held / _MEBIBYTE,
        run.kv_bytes_unshared / _MEBIBYTE,
        ("held", "if nothing\nwere shared"),
    )
    return figure


def _panel(
    axes: Axes,
    title: str,
    unit: str,
    value: float,
    unshared_value: float | None,
    names: tuple[str, str],
) -> None:
    bars = [axes.bar(names[0], value, width=0.6, **_SHARED)]
    bars.append(axes.bar(names[1], unshared_value or 0.0, width=0.6, **_UNSHARED))
    for bar, shown in zip(bars, (value, unshared_value), strict=True):
        axes.bar_label(bar, labels=["" if shown is None else _short(shown)], padding=2)
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.15 * max(value, unshared_value or 0.0) or 1)
    axes.spines[["top", "right"]].set_visible(False)


def _name(run: Measured) -> str:
    return f"{'shared' if run.sharing else 'without sharing'}\n(batch {run.batch})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
