"""Part `command-buffers`: are the launches of the decode loop captured in CUDA graphs?

XLA gathers runs of launches into command buffers, which the device starts by itself; what it cannot
capture costs the host some microseconds each. It dumps what it decided.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from experiments.compile_report.hlo import Module
from experiments.compile_report.target import target_named
from experiments.compile_report.thunks import COMMAND_BUFFER, parse_thunk_operations, parse_thunks
from experiments.gpu import small_model
from experiments.gpu.bench import Bench, Program

_CASE = "decode loop"
_PALLAS = ("__gpu$xla.gpu.triton", "mosaic_gpu")


def run(bench: Bench) -> None:
    from experiments.compile_report.program_sizes import ProgramSize
    from experiments.compile_report.programs import decode_case

    size = ProgramSize(small_model.config(bench.small), rows=16, num_chunks=256)
    if bench.small:
        size = ProgramSize(
            small_model.TINY, rows=2, num_chunks=8, chunk_size=16, dtype="float32", steps=2
        )
    for backend, missing in bench.backends.items():
        if missing:
            bench.record.skipped(_CASE, backend, missing)
            continue
        with tempfile.TemporaryDirectory() as folder:
            case = decode_case(size, backend, target_named("h200"))
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            key = ("command buffers", backend, folder)
            program = Program(key, case.function, case.arguments, case.donated, options)
            try:
                compiled = bench.get(program)
                counts = launches(Path(folder), compiled.as_text() or "")
            except Exception as error:
                bench.record.failed(_CASE, backend, error)
                continue
        if not counts:
            bench.record.skipped(
                _CASE, backend, "XLA dumps no launches: it did not compile for a GPU"
            )
        for name, value in counts.items():
            bench.record.measured(_CASE, f"{backend} {name}", value, "launches")


def launches(folder: Path, hlo: str) -> dict[str, int]:
    """How many launches there are, how many of them captured, of Pallas kernels and of all."""
    outline = _read(folder, "*thunk_sequence_after_thunk_passes.txt")
    thunks = parse_thunks(outline or _read(folder, "*thunk_sequence.txt"))
    if not thunks:
        return {}
    targets = Module(hlo).custom_calls()
    operations = parse_thunk_operations(_read(folder, "*thunk_metadata.txt"))
    counts: Counter[str] = Counter({"pallas captured": 0, "command buffers": 0})
    for thunk in thunks:
        if thunk.kind == COMMAND_BUFFER:
            counts["command buffers"] += 1
            continue
        target = targets.get(operations.get(thunk.identifier, ""), "")
        kinds = ["all", *(["pallas"] if target.startswith(_PALLAS) else [])]
        for kind in kinds:
            counts[kind] += 1
            counts[f"{kind} captured"] += thunk.captured
    return dict(counts)


def _read(folder: Path, pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob(pattern)))
