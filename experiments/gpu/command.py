"""`python -m experiments gpu`: everything that only a GPU can tell, in one run of some minutes.

In this order, each a `--part`:

- `target` keeps XLA's description of the device, to compile for it where there is none.
- `correctness` runs every case of `pallas_kernels.specs`, on each backend and with each way of
  packing work, against float64. The error may be twice that of a plain implementation in the same
  dtype. Everything is run twice, and must not change.
- `tokens` decodes greedily with a small model and compares with the CPU's tokens.
- `command-buffers` counts the launches that XLA captured in CUDA graphs.
- `floors` measures the copy bandwidth and the matrix rate.
- `paper`, `trees` and `hydragen` time attention on the grid of ChunkAttention's Table 3
  (arXiv 2402.15220), on PAT's trees (ASPLOS 2026), and on Hydragen's micro benchmark (ICML 2024):
  our kernels, the same with every row by itself, some of them over encoded chunks, jax's own paged
  attention, and FlashInfer and PyTorch where these are installed.
- `decode` times the decode loop of a Llama 8B with random weights.
- `tune` (when asked for) varies the planner's constants.

Two floors bound attention from below: reading each distinct key and value once at the measured copy
bandwidth, and its products at the measured matrix rate. `fraction_of_floor` is the larger of the
two times over the measured one.

How a kernel of some microseconds is timed: one program is a loop of 64 calls, or of 8 where a call
is slow. Each call's output is the next one's queries, so that all must run, one after another; each
reads the next layer of a pool of 34 GB, so that no call finds the last one's keys in the L2 cache
(where all layers together are smaller than that cache, and only there, it may). As many programs as
take 20 ms are started back to back and waited for once. The time of a call is what that took over
the number of calls: it includes counting the loop, which `floors` measures as `empty loop`, and the
gaps between launches, and nothing is subtracted. The sides of a case are timed in turns, in an
order that changes, five or seven times; the median, the least and the most are told.

    python -m experiments gpu
    python -m experiments gpu --part floors trees --minutes 4
    python -m experiments gpu --dry-run
    python -m experiments gpu --compile-only --part paper decode

`--dry-run` rehearses every part on a CPU, with tiny cases and kernels in the interpreter.
`--compile-only` compiles the programs of every part for an H200, with no GPU (install the extra
`gpu-check`).
"""

from __future__ import annotations

import os
import re
from datetime import date
from pathlib import Path
from typing import Any

from experiments.gpu.config import RESULTS, GpuConfig, check
from experiments.harness.commands import Experiment
from experiments.harness.reading import SUMMARY
from experiments.harness.runs import new_run_path, open_results

_MEMORY_FRACTION = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.7")  # the rest is for peers in PyTorch


def run(config: GpuConfig) -> dict[str, Any]:
    """Run the experiment, print its records, and return a short summary.

    Raises:
      UserError: a value that no run could use, or no GPU.
      CheckFailed: a check that failed, once the results are written.
      KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    os.environ.setdefault(*_MEMORY_FRACTION)
    if config.mode != "measure":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before anything imports jax
    with open_results("gpu", config, default_folder(config)) as folder:
        from experiments.gpu.runner import run_parts

        return run_parts(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, Any]:
    """What a sweep shows of a run."""
    records = sum(sum(statuses.values()) for statuses in summary["counts"].values())
    return {"failures": len(summary["failures"]), "records": records}


def default_folder(config: GpuConfig) -> Path:
    """Where the results of a run go: beside the other committed ones only if they were measured.

    One that was broken off there is gone on with.
    """
    if config.mode != "measure":
        return new_run_path("gpu")
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        return new_run_path("gpu")
    kind = device.device_kind.lower().removeprefix("nvidia")
    name = "-".join(re.findall(r"[a-z0-9]+", kind))
    stem, count = RESULTS / f"{name}-{date.today()}" / "gpu", 1
    path = stem
    while (path / SUMMARY).exists():
        count += 1
        path = stem.with_name(f"gpu-{count}")
    return path


GPU = Experiment("gpu", GpuConfig, run, check, headline)
