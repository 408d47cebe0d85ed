"""What `cache` shows: hit rates and evictions by pool and policy, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from experiments.cache.policies import LRU, SIMULATED
from experiments.harness.plotting import LIMIT, line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, significant, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NO_BOUND, _FREE = "no bound", "free-at-once"
_NAMES = {
    "lru": "LRU",
    "free-at-once": "free at once",
    "fifo": "FIFO*",
    "lfu": "LFU*",
    "lfu-aged": "LFU, aged*",
    "length-aware": "length-aware*",
    "optimal": "optimal*",
}
_STYLES = {"lru": 0, "free-at-once": 1, "fifo": 2, "lfu": 3, "lfu-aged": 4, "length-aware": 5}
_STYLES["optimal"] = 7  # the palette's black: nothing lies above it but the limit


def tables(result: Result) -> list[ResultTable]:
    shown = [_hit_table(result), _evicted_table(result)] if _bounded(result) else []
    if _FREE in result.config["policies"]:
        shown.append(_free_table(result))
    if result.of_kind("codec"):
        shown.append(_codec_table(result))
    return [*shown, _time_table(result)]


def figures(result: Result) -> dict[str, Figure]:
    """Hit rates by policy, of the first chunk size; and of LRU by chunk size."""
    chunk_sizes = result.config["chunk_sizes"]
    by_chunk_size = len(chunk_sizes) > 1 and "lru" in result.config["policies"]
    figure = make_figure(11.0 if by_chunk_size else 7.5, 5.0)
    panels = figure.subplots(
        1, 1 + by_chunk_size, sharey=True, squeeze=False,
        width_ratios=(3, 2) if by_chunk_size else (1,),
    )[0]  # fmt: skip
    figure.suptitle(f"Prompt tokens found in a prefix cache: {result.header['workload']}")
    _draw_policies(panels[0], result, chunk_sizes[0])
    if by_chunk_size:
        _draw_chunk_sizes(panels[1], result)
    return {"hit-rates": figure}


def _bounded(result: Result) -> list[str]:
    return [policy for policy in result.config["policies"] if policy != _FREE]


def _record(result: Result, policy: str, chunk_size: int) -> Record:
    wanted = policy, chunk_size
    return next(
        record
        for record in result.of_kind("replays")
        if (record["policy"], record["chunk_size"]) == wanted
    )


def _hit_table(result: Result) -> ResultTable:
    header = result.header
    title = (
        f"Prompt tokens found, of {header['prompt_tokens']:,} in {header['num_requests']:,} "
        f"requests ({header['workload']})"
    )
    notes = (
        f"{header['distinct_tokens']:,} tokens are distinct; the longest prompt has "
        f"{header['longest_prompt']:,}.",
        "* simulated: the engine does not have it. LRU is what its prefix tree does.",
        f"Evicted first, always leaves of the tree: {_rules(result)}. No policy finds more than "
        "the optimal one.",
        "Requests come one after another, each released before the next; answers are not cached. A "
        "request is refused if its prompt is longer than the pool; its tokens count as not found.",
    )
    return _by_pool(result, title, lambda replay: f"{replay['hit_rate']:.2%}", notes, full=True)


def _rules(result: Result) -> str:
    policies = {"lru": LRU, **SIMULATED}
    return "; ".join(f"{_NAMES[name]} {policies[name].meaning}" for name in _bounded(result))


def _evicted_table(result: Result) -> ResultTable:
    return _by_pool(result, "Chunks evicted", lambda replay: f"{replay['evicted_chunks']:,}")


def _by_pool(
    result: Result,
    title: str,
    cell: Callable[[Record], str],
    notes: tuple[str, ...] = (),
    *,
    full: bool = False,
) -> ResultTable:
    """A row for each pool, a column for each policy that has pools.

    `full` adds what depends on the pool alone: its size in GiB, if it is known, and the requests
    that are refused.
    """
    policies, config = _bounded(result), result.config
    per_token = config["bytes_per_token"] if full else None
    columns = [Column("chunk"), Column("pool, tokens")]
    columns += [Column("GiB")] if per_token else []
    columns += [Column("refused")] if full else []
    columns += [Column(_NAMES[policy]) for policy in policies]
    sections = []
    for chunk_size in config["chunk_sizes"]:
        records = [_record(result, policy, chunk_size)["replays"] for policy in policies]
        rows = []
        for pool, replays in zip(config["pool_tokens"], zip(*records, strict=True), strict=True):
            row = [str(chunk_size), f"{pool:,}"]
            row += [f"{pool * per_token / 2**30:,.1f}"] if per_token else []
            row += [f"{replays[0]['refused']:,}"] if full else []
            rows.append([*row, *map(cell, replays)])
        unbounded = _record(result, _NO_BOUND, chunk_size)["replays"][0]
        row = [str(chunk_size), _NO_BOUND, *([""] if per_token else [])]
        row += ["0"] if full else []
        rows.append([*row, *(cell(unbounded) for _ in policies)])
        sections.append(rows)
    return table_of(title, columns, *sections, notes=notes)


def _free_table(result: Result) -> ResultTable:
    config, requests = result.config, result.header["num_requests"]
    sections = []
    for chunk_size in config["chunk_sizes"]:
        replays = _record(result, _FREE, chunk_size)["replays"]
        sections.append(
            [
                (
                    str(chunk_size),
                    str(in_use),
                    f"{replay['pool_tokens']:,}",
                    f"{replay['hit_rate']:.2%}",
                    f"{replay['requests_hit'] / requests:.2%}",
                )
                for in_use, replay in zip(config["in_use"], replays, strict=True)
            ]
        )
    columns = ["chunk", "requests in use", "most tokens held", "tokens found", "requests that hit"]
    return table_of(
        "Free at once, the paper's policy: only requests in use at the same time share",
        [Column(heading) for heading in columns],
        *sections,
        notes=(
            "Each request is released when as many others have come. Requests that overlap change "
            "nothing for LRU in a pool that holds them, but for their tails: it keeps the latest "
            "anyway.",
        ),
    )


def _codec_table(result: Result) -> ResultTable:
    """A row for each pool, by what it holds in float16; a column for each codec."""
    config = result.config
    sections, notes = [], []
    for chunk_size in config["chunk_sizes"]:
        coded = [r for r in result.of_kind("codec") if r["chunk_size"] == chunk_size]
        times = ", ".join(f"{r['codec']} {r['times_as_many_tokens']:.2f}" for r in coded)
        notes.append(f"Times as many tokens in the same bytes, chunks of {chunk_size}: {times}.")
        by_pool = zip(*(record["replays"] for record in coded), strict=True)
        sections.append(
            [
                (str(chunk_size), f"{pool:,}", *(f"{one['hit_rate']:.2%}" for one in replays))
                for pool, replays in zip(config["pool_tokens"], by_pool, strict=True)
            ]
        )
    columns = [Column("chunk"), Column("pool, float16 tokens"), *map(Column, config["codec"])]
    notes.append(
        f"Heads of {config['head_dim']} numbers. Scales and zeros are counted; each running row's "
        "exact last chunk is not."
    )
    title = "LRU at equal bytes: prompt tokens found, by what chunks are stored as"
    return table_of(title, columns, *sections, notes=notes)


def _time_table(result: Result) -> ResultTable:
    records = result.of_kind("replays")
    rows = [
        (
            record["policy"],
            str(record["chunk_size"]),
            str(len(record["replays"])),
            significant(1e3 * record["seconds"]),
            significant(record["tokens_per_second"] / 1e6),
        )
        for record in records
    ]
    columns = [
        Column("policy", numeric=False),
        Column("chunk"),
        Column("replays"),
        Column("ms", timed=True),
        Column("million tokens/s", timed=True),
    ]
    return table_of("Time of the replays", columns, rows)


def _draw_policies(axes: Axes, result: Result, chunk_size: int) -> None:
    for policy in result.config["policies"]:
        style = line_style(_STYLES[policy])
        if policy == "fifo":  # often equal to LRU: its markers show behind
            style |= {"markersize": 9, "zorder": 1.9}
        replays = _record(result, policy, chunk_size)["replays"]
        pools = result.config["pool_tokens"]
        if policy == _FREE:
            pools = [replay["pool_tokens"] for replay in replays]
        _draw_line(axes, pools, replays, _NAMES[policy], style)
        if policy == _FREE:
            for in_use, pool, replay in zip(result.config["in_use"], pools, replays, strict=True):
                point = pool, 100 * replay["hit_rate"]
                above = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
                axes.annotate(str(in_use), point, (0, 6), **above)
    _draw_unbounded(axes, result, chunk_size, "no bound")
    _finish_axes(axes, f"by what is evicted first, chunks of {chunk_size}")
    axes.set_ylabel("prompt tokens found, %")
    note = "* simulated" + (
        "; free at once: numbers are requests in use" if _FREE in result.config["policies"] else ""
    )
    _add_legend(axes, note, columns=4)


def _draw_chunk_sizes(axes: Axes, result: Result) -> None:
    for index, chunk_size in enumerate(result.config["chunk_sizes"]):
        replays = _record(result, "lru", chunk_size)["replays"]
        pools = result.config["pool_tokens"]
        _draw_line(axes, pools, replays, f"chunks of {chunk_size}", line_style(index))
        _draw_unbounded(axes, result, chunk_size, "no bound" if index == 0 else None)
    _finish_axes(axes, "LRU, by chunk size")
    _add_legend(axes, "", columns=2)


def _draw_line(
    axes: Axes, pools: list[int], replays: list[Record], label: str, style: dict
) -> None:
    points = sorted(zip(pools, (100 * replay["hit_rate"] for replay in replays), strict=True))
    axes.plot(*zip(*points, strict=True), label=label, **style)


def _draw_unbounded(axes: Axes, result: Result, chunk_size: int, label: str | None) -> None:
    rate = _record(result, _NO_BOUND, chunk_size)["replays"][0]["hit_rate"]
    axes.axhline(100 * rate, **LIMIT, label=label)


def _finish_axes(axes: Axes, title: str) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain_axes(axes, title, "pool, tokens", "")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(bottom=0)


def _add_legend(axes: Axes, title: str, columns: int) -> None:
    """Below the axes, where it hides nothing."""
    axes.legend(
        title=title, title_fontsize=8, fontsize=8, frameon=False, ncols=columns,
        loc="upper center", bbox_to_anchor=(0.5, -0.14),
    )  # fmt: skip


def _short(count: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"
