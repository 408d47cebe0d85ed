"""What `cluster` shows: a row for each fleet and policy, the device model, and a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from experiments.harness.plotting import from_zero, line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, significant, table_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SERIES = ("random", "least-loaded", "prefix-hash", "longest-match", "least-work")


def tables(result: Result) -> list[ResultTable]:
    """Fleets and policies; and what the device model was fitted to."""
    shown = [_fleets(result), _routing(result)]
    return [*shown, _device(result)] if result.of_kind("fit") else shown


def figures(result: Result) -> dict[str, Figure]:
    """Hit rate, imbalance and time to the first token, by policy and size of the fleet."""
    replays = result.of_kind("replay")
    if not replays:
        return {}
    figure = make_figure(11.0, 4.2)
    panels = figure.subplots(1, 3)
    figure.suptitle(f"{result.header['workload']}: {_setting(result)}")
    _draw(panels[0], replays, "prompt tokens found, %", lambda one: 100 * one["hit_rate"])
    _draw(panels[1], replays, "busiest replica, times the mean", lambda one: one["busiest_by_mean"])
    _draw(panels[2], replays, "seconds to first token, p90", lambda one: one["first_token"]["p90"])
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=False)
    return {"fleets": figure}


def _draw(axes: Axes, replays: list[Record], name: str, value) -> None:
    sizes = sorted({one["replicas"] for one in replays})
    for policy in dict.fromkeys(one["policy"] for one in replays):
        some = sorted((one["replicas"], value(one)) for one in replays if one["policy"] == policy)
        places, heights = [sizes.index(size) for size, _ in some], [height for _, height in some]
        axes.plot(places, heights, label=policy, **line_style(_SERIES.index(policy)))
    plain_axes(axes, name, "replicas", "")
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set_xlim(-0.4, len(sizes) - 0.6)
    from_zero(axes, (value(one) for one in replays), room=1.1)


def _setting(result: Result) -> str:
    config = result.config
    return (
        f"{result.header['num_requests']:,} requests, pools of {config['pool_tokens']:,} tokens, "
        f"load {config['load']:g}"
    )


def _fleets(result: Result) -> ResultTable:
    columns = [
        Column("replicas"), Column("policy", numeric=False), Column("tokens found"),
        Column("busiest / mean"), Column("busy"), Column("first token, p50"), Column("p90"),
        Column("p99"), Column("s per token, p50"),
    ]  # fmt: skip
    sections = [
        [
            (
                f"{size:,}",
                one["policy"],
                f"{one['hit_rate']:.1%}",
                f"{one['busiest_by_mean']:.2f}",
                f"{one['busy']:.0%}",
                *(significant(one["first_token"][name]) for name in ("p50", "p90", "p99")),
                significant(one["seconds_per_token"]["p50"]),
            )
            for one in result.of_kind("replay")
            if one["replicas"] == size
        ]
        for size in result.config["replicas"]
    ]
    header = result.header
    refused = max((one["refused"] for one in result.of_kind("replay")), default=0)
    notes = [
        f"{header['prompt_tokens']:,} prompt tokens, {header['longest_prompt']:,} of the longest; "
        f"{refused} requests refused that no pool could hold. Busy: the share of time that "
        "devices work; busiest / mean: of the seconds that each works.",
        "Seconds are simulated, by the device model; trees, KV events and router are real.",
    ]
    title = f"{header['workload']}: {_setting(result)}"
    return table_of(title, columns, *sections, notes=notes)


def _routing(result: Result) -> ResultTable:
    columns = [
        Column("replicas"), Column("policy", numeric=False), Column("to the longest match"),
        Column("it was overloaded"), Column("passed by"), Column("no match"),
        Column("tokens expected"), Column("evicted"), Column("chunks in the map"),
        Column("µs to route", timed=True), Column("µs for events", timed=True),
    ]  # fmt: skip
    sections = [
        [
            (
                f"{size:,}",
                one["policy"],
                *(f"{one[name]:,}" for name in ("matched", "overloaded", "passed_by", "unmatched")),
                f"{one['predicted_hit_rate']:.1%}",
                f"{one['evicted_chunks']:,}",
                f"{one['map_chunks']:,}",
                f"{one['route_microseconds']:.0f}",
                f"{one['apply_microseconds']:.0f}",
            )
            for one in result.of_kind("replay")
            if one["replicas"] == size
        ]
        for size in result.config["replicas"]
    ]
    notes = [
        "Of requests: those that went where most of their prompt was; those that did not since it "
        "was overloaded, or since the policy would not; and those that nobody held anything of. "
        "Tokens expected: what the router's map said would be found, when it chose."
    ]
    return table_of("Routing", columns, *sections, notes=notes)


def _device(result: Result) -> ResultTable:
    [fit] = result.of_kind("fit")
    rows = [
        (name, f"{1e6 * fit[key]:.4g}")
        for key, name in {
            "call": "a prefill call of at most 512 tokens",
            "token": "a token of a prompt",
            "pair": "a token of a prompt and one it attends to",
            "step": "a decode step",
            "row": "a row in it",
            "read": "a token that is read",
            "product": "a row and a token that it attends to",
        }.items()
    ]
    errors = ", ".join(
        f"{name} {error['median']:.0%} (at most {error['most']:.0%})"
        for name, error in fit["errors"].items()
    )
    notes = [f"Fitted to an engine of {fit['model']}; points are missed by, median: {errors}."]
    for one in result.of_kind("burst"):
        notes.append(
            f"Check: {one['requests']} requests at once take {one['seconds']:.2f} s, and "
            f"{one['seconds_modelled']:.2f} by the model; first tokens come after "
            f"{one['first_token']:.2f} and {one['first_token_modelled']:.2f}, on average."
        )
    columns = [Column("what", numeric=False), Column("microseconds", timed=True)]
    return table_of("Device model", columns, rows, timed_notes=notes)
