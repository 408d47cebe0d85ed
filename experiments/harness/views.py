"""Showing a result: the same tables and pictures when a run ends and whenever they are wanted.

An experiment's views are a module with two functions of a `Result`: `tables` gives what a reader
should see, `figures` pictures by name. They know nothing but the result, so a page can be made of
it on another machine, years later.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from experiments.harness.console import make_console
from experiments.harness.json_text import as_read
from experiments.harness.reading import Record, Result, read_result
from experiments.harness.results import ResultFolder
from experiments.harness.tables import ResultTable, print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS: dict[str, str] = {
    "cache": "experiments.cache.views",
    "calibrate": "experiments.calibrate.views",
    "cluster": "experiments.cluster.views",
    "compile-report": "experiments.compile_report.views",
    "decode": "experiments.decode.views",
    "distill-prefix": "experiments.distill_prefix.views",
    "engine": "experiments.engine.views",
    "generate": "experiments.generate.views",
    "gpu": "experiments.gpu.views",
    "gradients": "experiments.gradients.views",
    "grpo": "experiments.grpo.views",
    "heads": "experiments.heads.views",
    "kernel": "experiments.kernel.views",
    "clusters": "experiments.clusters.views",
    "layers": "experiments.layers.views",
    "load": "experiments.load.views",
    "minor": "experiments.minor.views",
    "quality": "experiments.quality.views",
    "scale": "experiments.scale.views",
    "score": "experiments.score.views",
    "search": "experiments.search.views",
    "serve": "experiments.serve.views",
    "soak": "experiments.soak.views",
    "sparse": "experiments.sparse.views",
    "tiers": "experiments.tiers.views",
    "train-tiny": "experiments.train_tiny.views",
    "tree": "experiments.tree.views",
    "sweep": "experiments.harness.sweep_views",
}
"""The module with an experiment's views, by the experiment."""


class Views(Protocol):
    def tables(self, result: Result) -> list[ResultTable]: ...

    def figures(self, result: Result) -> dict[str, Figure]: ...


def views_of(experiment: str) -> Views:
    return cast(Views, import_module(VIEWS[experiment]))


def finish(folder: ResultFolder, summary: Record, printed: Collection[str] = ()) -> Record:
    """End a run: draw its pictures, write its summary, print its tables; returns the summary.

    Tables with the titles `printed` are on the terminal already. A run that is broken off before
    its summary is written can be gone on with.
    """
    from experiments.harness.plotting import save_figures

    result = replace(read_result(folder.path), summary=as_read(summary))
    views = views_of(folder.experiment)
    pictures = save_figures(folder.path, views.figures(result))
    folder.write_summary(summary)
    console = make_console()
    for table in views.tables(result):
        if table.title not in printed:
            print_table(console, table)
    for picture in pictures:
        console.print(f"picture: {picture}", markup=False, soft_wrap=True)
    # Never wrapped or coloured: it is there to be copied.
    console.print(f"results: {folder.path}", markup=False, soft_wrap=True)
    return summary
