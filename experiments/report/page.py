"""The page of `report`: results found, and shown by their experiments' views."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.harness.console import make_console
from experiments.harness.errors import UserError
from experiments.harness.json_text import is_half_a_pair
from experiments.harness.plotting import save_figures
from experiments.harness.reading import RESULTS, Result, folder_of, read_result
from experiments.harness.runs import new_run_path
from experiments.harness.tables import to_markdown
from experiments.harness.views import VIEWS, views_of
from experiments.report.config import ReportConfig

PAGE = "report.md"


def write_page(config: ReportConfig) -> dict[str, Any]:
    """Find the results, write the page and the pictures; returns a summary."""
    results, unreadable = _read_all(find_results(config.results))
    folder = config.output or new_run_path("report")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = short_names(list(results))
        parts = [_part(names[path], result, folder) for path, result in results.items()]
        page = folder / PAGE
        page.write_text("\n".join([f"# {config.title}\n", *parts]), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written ({error})") from error
    make_console().print(f"page: {page}", markup=False, soft_wrap=True)
    return {
        "experiment": "report",
        "page": str(page),
        "results": [str(path) for path in results],
        "unreadable": unreadable,
        "unfinished": [str(path) for path, one in results.items() if one.summary is None],
    }


def _read_all(paths: list[Path]) -> tuple[dict[Path, Result], list[str]]:
    """Those that can be read, and what is wrong with the others, which is also told."""
    results: dict[Path, Result] = {}
    problems: list[str] = []
    for path in paths:
        try:
            if is_half_a_pair(str(path)):
                raise UserError(f"{str(path)!a} is no text in UTF-8, so that no page can name it")
            result = read_result(path)
            if result.experiment not in VIEWS:
                raise UserError(f"{path} is of {result.experiment!r}, which is no experiment here")
            results[path] = result
        except UserError as error:
            problems.append(str(error))
    if not results:
        raise UserError("; ".join(problems))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    return results, problems


def find_results(given: Iterable[Path]) -> list[Path]:
    """The result folders among `given`, and below them, each once; of a sweep only itself.

    Raises:
      UserError: a folder that does not exist, or holds no result.
    """
    found: dict[Path, Path] = {}
    for path in given:
        folder = folder_of(path)
        try:
            if not folder.is_dir():
                raise UserError(f"{path} is no folder")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        below = sorted(one.parent for one in folder.rglob(RESULTS))
        # The points of a sweep are in its own table.
        below = [one for one in below if one == folder or not (one.parent / RESULTS).exists()]
        if not below:
            raise UserError(f"{path} holds no results: no {RESULTS} in it, nor below it")
        for one in below:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def short_names(paths: list[Path]) -> dict[Path, str]:
    """A name for each folder, as short as tells them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = {path: "-".join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(paths):
            return names
    raise AssertionError(paths)


def _part(name: str, result: Result, folder: Path) -> str:
    lines = [f"## {name}", "", _origin(result), ""]
    if result.summary is None:
        done = len(result.finished)
        return "\n".join([*lines, f"Broken off after {done} units; no tables yet.", ""])
    views = views_of(result.experiment)
    pictures = {f"{name}-{what}": figure for what, figure in views.figures(result).items()}
    for picture in save_figures(folder, pictures):
        svg = picture.with_suffix(".svg").name
        lines += [f"[![{picture.stem}]({picture.name})]({svg})", ""]
    lines += [to_markdown(table) for table in views.tables(result)]
    return "\n".join(lines)


def _origin(result: Result) -> str:
    where = result.environment
    versions = ", ".join(f"{name} {one}" for name, one in where["versions"].items() if one)
    device = where["device"] or "no device used"
    commit = where["commit"] or "unknown commit"
    settings = "".join(f", {name}={one}" for name, one in where.get("settings", {}).items())
    return (
        f"`{shlex.join(where['command'])}`\n\n"
        f"{result.header['date']}, {device}, {where['cpu_count']} CPUs, {where['machine']}, "
        f"Python {where['python']}, {versions}{settings}; commit {commit}"
    )
