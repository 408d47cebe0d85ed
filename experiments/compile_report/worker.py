"""Compiling cases in processes of their own, some at a time.

A mistake such as three warps aborts the compiler and the process with it; JAX keeps some kernels
it has compiled and then leaves no report of them; and the process must not start a real GPU. So
cases are compiled by `python -m experiments.compile_report.worker`, which writes a line of JSON for
each. After an abort the rest goes to a new process.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Event, Lock
from typing import Any

from experiments.compile_report.target import GpuTarget, target_named
from experiments.harness.json_text import from_json, to_json

SECONDS_PER_CASE = 300
_CASES_PER_PROCESS = 8
_FATAL = re.compile(r"Fatal|Check fail|Assertion")


def compile_cases(
    table: str,
    names: Sequence[str],
    target: GpuTarget,
    *,
    per_process: int = _CASES_PER_PROCESS,
    processes: int = 2,
    dump: Path | None = None,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
) -> list[dict[str, Any]]:
    """Compiles the cases `names` of `table`, "module:function", where the function returns them.

    Args:
      per_process: cases that one process compiles. Use 1 for whole programs: two of them may hold
        the same kernel.
      processes: how many run at a time.
      dump: a folder that keeps what the compiler writes, in one subfolder for each case.
      on_record: called with every record as soon as it is there.

    Returns:
      A record for each case, in the order of `names`: what `describe` returns, or its name and
      `error`.
    """
    batches = [names[first : first + per_process] for first in range(0, len(names), per_process)]
    records: dict[str, dict[str, Any]] = {}

    lock, stopping = Lock(), Event()
    running: set[subprocess.Popen] = set()

    def work(batch: Sequence[str]) -> None:
        left = list(batch)
        while left and not stopping.is_set():
            done = _run_process(table, left, target, dump, running)
            for record in done:
                left.remove(record["name"])
                with lock:
                    records[record["name"]] = record
                    on_record(record)

    with ThreadPoolExecutor(processes) as pool:
        try:
            list(pool.map(work, batches))
        except BaseException:
            stopping.set()
            for process in list(running):
                process.kill()
            raise
    return [records[name] for name in names]


def _run_process(
    table: str,
    names: Sequence[str],
    target: GpuTarget,
    dump: Path | None,
    running: set[subprocess.Popen],
) -> list[dict[str, Any]]:
    """Records of the first cases of `names`, at least one; the last may tell of an abort."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "records.jsonl"
        output.touch()
        job = {
            "table": table,
            "names": list(names),
            "target": target.name,
            "dump": str(dump) if dump else None,
            "output": str(output),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.compile_report.worker", to_json(job)],
            # Whatever a real GPU of this machine is doing, it is left alone.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt goes to this process, which ends the others
        )
        running.add(process)
        try:
            _, said = process.communicate(timeout=SECONDS_PER_CASE * len(names))
            failure = _reason(said) or f"exit code {process.returncode}"
        except subprocess.TimeoutExpired as expired:
            process.kill()
            process.communicate()
            failure = f"not compiled within {expired.timeout:.0f} s"
        finally:
            running.discard(process)
        records = [from_json(line) for line in output.read_text().splitlines()]
        if len(records) < len(names):
            name = names[len(records)]
            records.append({"name": name, "error": f"the compiler stopped: {failure}"})
        return records


def describe(name: str, target: GpuTarget, case: Any, dump: Path | None) -> dict[str, Any]:
    """Compiles one case in this process and puts what came out into JSON values."""
    from experiments.compile_report.compiled import compile_for

    compiled = compile_for(target, case.function, case.arguments, donated=case.donated, dump=dump)
    record: dict[str, Any] = {
        "name": name,
        "kernels": sorted(map(asdict, compiled.kernels), key=lambda kernel: kernel["name"]),
        "pallas_launches": compiled.pallas_launches,
        "captured_pallas_launches": compiled.captured_pallas_launches,
        "command_buffers": compiled.command_buffers,
        "collectives": compiled.collectives,
        "argument_bytes": compiled.argument_bytes,
        "temporary_bytes": compiled.temporary_bytes,
        "aliased_bytes": compiled.aliased_bytes,
        "compile_seconds": round(compiled.seconds, 3),
    }
    if case.chunk_bytes:
        record["chunk_bytes"] = case.chunk_bytes
    if case.pool_bytes:
        sizes = {"pool_bytes": case.pool_bytes, "layer_bytes": case.layer_bytes}
        record |= sizes | {"pool_copies": compiled.pool_copies(**sizes)}
    return record


def main(argument: str) -> None:
    """Compiles the cases that a JSON object names, and writes a line for each."""
    job = from_json(argument)
    target = target_named(job["target"])
    module, _, function = job["table"].partition(":")
    cases = getattr(importlib.import_module(module), function)()
    with open(job["output"], "a", encoding="utf-8") as output:
        for name in job["names"]:
            dump = Path(job["dump"]) / _file_name(name) if job["dump"] else None
            try:
                record = describe(name, target, cases[name](target), dump)
            except Exception as error:
                record = {"name": name, "error": f"{type(error).__name__}: {_first_lines(error)}"}
            output.write(to_json(record) + "\n")
            output.flush()


def _first_lines(error: Exception, most: int = 600) -> str:
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line)[:most]


def _reason(said: str) -> str:
    """What an aborted process said was wrong: a fatal error, or the last line of all."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line.partition("] ")[2] or line for line in lines if _FATAL.search(line)]
    return (told or lines[-1:] or [""])[0]


def _file_name(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in name).split())


if __name__ == "__main__":
    main(sys.argv[1])
