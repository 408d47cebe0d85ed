"""What `grpo` shows of a result: how the reward rose, by steps and by seconds."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from experiments.grpo.config import WAYS
from experiments.harness.plotting import line_style, make_figure, plain_axes
from experiments.harness.reading import Record, Result
from experiments.harness.tables import Column, ResultTable, table_of


def _title(result: Result) -> str:
    config = result.config
    return f"GRPO: to {config['task']} {config['digits']} digits"


def _of_way(result: Result, way: str) -> list[Record]:
    return [one for one in result.of_kind("steps") if one["way"] == way]


def tables(result: Result) -> list[ResultTable]:
    """Both ways, block by block."""
    columns = (
        Column("", numeric=False),
        Column("step"),
        Column("reward"),
        Column("all digits right"),
        Column("tokens sampled"),
        Column("tokens learnt from"),
        Column("seconds to sample", timed=True),
        Column("to learn", timed=True),
        Column("to serve", timed=True),
    )
    rows = [
        (
            way,
            str(one["step"]),
            f"{np.mean(one['rewards']):.3f}",
            f"{np.mean(one['exact']):.1%}",
            f"{one['sampled']:,}",
            f"{one['learnt_from']:,}",
            *(f"{one['seconds'][part]:.1f}" for part in ("sample", "learn", "serve")),
        )
        for way in WAYS
        for one in _of_way(result, way)
    ]
    config = result.config
    notes = [
        f"Each step has {config['prompts']} questions behind the same {config['instructions']} "
        f"tokens, and {config['samples']} samples of each. Rewards, tokens and seconds are those "
        "of the steps since the row before; without compiling, which took "
        + " and ".join(
            f"{sum(one['compile_seconds'] for one in records):.0f} seconds ({way})"
            for way in WAYS
            if (records := _of_way(result, way))
        )
        + " for programs that learn.",
        *(f"{way}: {meaning}." for way, meaning in WAYS.items()),
    ]
    return [table_of(_title(result), columns, rows, notes=notes)]


def figures(result: Result) -> dict[str, Figure]:
    """The reward over steps and over seconds; each point is the mean of some steps."""
    if not result.of_kind("steps"):
        return {}
    figure = make_figure(9.0, 3.6)
    by_step, by_second = figure.subplots(1, 2, sharey=True)
    for index, way in enumerate(WAYS):
        steps, seconds, rewards, done, spent = [], [], [], 0, 0.0
        for one in _of_way(result, way):
            took = sum(one["seconds"].values())
            size = max(1, len(one["rewards"]) // 5)
            for begin in range(0, len(one["rewards"]), size):
                some = one["rewards"][begin : begin + size]
                steps.append(done + begin + len(some))
                seconds.append(spent + took * (begin + len(some)) / len(one["rewards"]))
                rewards.append(float(np.mean(some)))
            done, spent = done + len(one["rewards"]), spent + took
        if steps:
            by_step.plot(steps, rewards, label=way, **line_style(index))
            by_second.plot(seconds, rewards, label=way, **line_style(index))
    for axes, x in ((by_step, "steps"), (by_second, "seconds, without compiling")):
        axes.set_ylim(0, 1.05)
        axes.legend(loc="best", frameon=False)
        plain_axes(axes, _title(result), x, "reward" if axes is by_step else "")
    return {"picture": figure}
