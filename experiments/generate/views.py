"""What `generate` shows of a result: the answers, and what sharing did."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.generate.decoding import Measured
from experiments.generate.summary import UNSHARED, measured_of
from experiments.harness.chunk_reads import reads_note
from experiments.harness.plotting import bar_style, from_zero, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, format_bytes, table_of

ANSWERS = "Answers"
_MEBIBYTE = 1 << 20
_NOT_RUN = "not run"


def tables(result: Result) -> list[ResultTable]:
    """The answers, what sharing saved, and the speed beside that without sharing."""
    lines = [line for line in result.of_kind("request") if line["of_unit"] != UNSHARED]
    shown, unshared = _runs(result)
    seconds = (result.summary or {}).get("seconds", {})
    return [answers(lines), sharing(shown), speed(shown, unshared, seconds)]


def figures(result: Result) -> dict[str, Figure]:
    """Tokens per second and KV bytes, shared and not."""
    shown, unshared = _runs(result)
    model, device = result.config["model"], result.environment["device"]
    title = f"{model} on {device}, {shown.shared_tokens:,} shared tokens"
    return {"picture": comparison_figure(title, shown, unshared)}


def _runs(result: Result) -> tuple[Measured, Measured | None]:
    shown, *rest = map(measured_of, result.of_kind("measured"))
    return shown, rest[0] if rest else None


def answers(lines: list[Record]) -> ResultTable:
    """A row for each request."""
    columns = [Column("#"), Column("Question", numeric=False), Column("Answer", numeric=False)]
    rows = [
        (str(line["index"]), _question(line), _answer(line))
        for line in sorted(lines, key=lambda line: line["index"])
    ]
    return table_of(ANSWERS, columns, rows)


def _question(line: Record) -> str:
    return line["prompt"] or f"({line['prompt_tokens']} token ids)"


def _answer(line: Record) -> str:
    text = line["text"]
    return " ".join(map(str, line["tokens"]) if text is None else text.split())


def sharing(run: Measured) -> ResultTable:
    """What the run computed and held, against what it would have been without sharing."""
    what = "What sharing did" if run.sharing else "Nothing was shared"
    names = ("", "this run", "without sharing", "saved")
    rows = [
        (
            "prompt tokens computed",
            f"{run.prefill_tokens_computed:,}",
            f"{run.prompt_tokens:,}",
            _saved(run.prefill_tokens_computed, run.prompt_tokens),
        ),
        (
            "KV cache held",
            format_bytes(run.kv_bytes_held),
            format_bytes(run.kv_bytes_unshared),
            _saved(run.kv_bytes_held, run.kv_bytes_unshared),
        ),
    ]
    note = (
        f"prompt tokens reused: {run.prefill_tokens_reused:,}; "
        f"longest shared prefix: {run.shared_tokens:,} tokens; plan: {run.plan_decision}"
    )
    notes = [note] if run.reads is None else [note, reads_note(run.reads)]
    return table_of(f"{what}, {_requests(run)}", _columns(names), rows, notes=notes)


def speed(run: Measured, unshared: Measured | None, seconds: dict[str, float]) -> ResultTable:
    """Rates of the run, beside those of the run without sharing; each with its batch."""
    rows = [("requests", str(run.batch), str(unshared.batch) if unshared else _NOT_RUN, "")]
    for name, field in (
        ("prompt tokens ready / s", "prompt_tokens_per_second"),
        ("prompt tokens computed / s", "prefill_tokens_per_second"),
        ("decode tokens / s", "decode_tokens_per_second"),
    ):
        mine = getattr(run, field)
        other = getattr(unshared, field) if unshared else 0.0
        ratio = f"{mine / other:.2f} x" if other else ""
        rows.append((name, f"{mine:,.0f}", f"{other:,.0f}" if unshared else "", ratio))
    notes = []
    if unshared is not None and unshared.batch != run.batch:
        notes.append(
            f"The two sides have different batches ({run.batch} and {unshared.batch} requests); "
            "--compare-batch chooses the second."
        )
    phases = [f"{name.replace('_', ' ')} {taken:.1f} s" for name, taken in seconds.items()]
    columns = _columns(("", "this run", "without sharing", "ratio"), timed=True)
    timed = [f"phases: {', '.join(phases)}"] if phases else []
    title = "Speed, compilation not counted"
    return table_of(title, columns, rows, notes=notes, timed_notes=timed)


def comparison_figure(title: str, run: Measured, unshared: Measured | None) -> Figure:
    """Two panels: decode rate, and KV memory of the run's own batch."""
    figure = make_figure()
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
    bars = [
        axes.bar(name, shown or 0.0, width=0.6, **bar_style(index))
        for index, (name, shown) in enumerate(zip(names, (value, unshared_value), strict=True))
    ]
    for bar, shown in zip(bars, (value, unshared_value), strict=True):
        axes.bar_label(bar, labels=["" if shown is None else _short(shown)], padding=2)
    plain_axes(axes, title, "", unit)
    from_zero(axes, (value, unshared_value or 0.0), room=1.15)


def _columns(names: tuple[str, ...], *, timed: bool = False) -> list[Column]:
    return [Column(name, numeric=bool(name), timed=timed and bool(name)) for name in names]


def _name(run: Measured) -> str:
    return f"{'shared' if run.sharing else 'without sharing'}\n(batch {run.batch})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _requests(run: Measured) -> str:
    return "1 request" if run.batch == 1 else f"{run.batch} requests"


def _saved(count: int, unshared: int) -> str:
    return f"{1 - count / unshared:.1%}" if unshared else ""
