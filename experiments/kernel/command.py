"""`python -m experiments kernel`: decode attention alone, timed against baselines and limits.

Every implementation attends to the same tokens of the same random pool. They are timed in one run
and in turns, each time with the caches full of something else, as between two layers of a model.
Timed among them are two limits: one large matrix product of as many floating-point operations, and
reading memory. No attention can be faster than the slower of its products at that rate and of
reading each distinct key and value once: its floor.

- `smoke` takes a minute, most of it compilation.
- `paper` is the grid of ChunkAttention's Table 3 (arXiv 2402.15220): 32 sequences, 32 heads of 128,
  chunks of 64; in float32 it takes some minutes on two cores, and 9 GB.
- `trees` are PAT's 20 trees with its four head configurations (ASPLOS 2026).
- `hydragen` is Hydragen's micro benchmark (ICML 2024): one prefix, many rows, one KV head.

The last two are made for GPUs: `--scale` divides their sizes so that a CPU can hold them.

    python -m experiments kernel
    python -m experiments kernel --suite paper
    python -m experiments kernel --suite paper --heads 32/8 32/4 --head-dim 64
    python -m experiments kernel --suite trees --implementations xla cascade paged
"""

from __future__ import annotations

from typing import Any

from experiments.harness.commands import Experiment
from experiments.harness.runs import open_results
from experiments.kernel.config import KernelConfig, check


def run(config: KernelConfig) -> dict[str, Any]:
    """Run the experiment, print its tables, draw its picture, and return its summary.

    Raises:
        UserError: a value that no run could use.
        KeyboardInterrupt: with a message that says where the results so far are.
    """
    check(config)
    with open_results("kernel", config) as folder:
        from experiments.kernel.run import measure

        return measure(config, folder)


def headline(summary: dict[str, Any]) -> dict[str, float | str | None]:
    """What a sweep would plot; speed-ups are geometric means over the cases."""
    sides = summary["sides"]
    ours = sides.get(summary["ours"], {})
    return {
        "ours": summary["ours"],
        "speed-up over paged": sides.get("paged", {}).get("ours_faster"),
        "speed-up over cascade": sides.get("cascade", {}).get("ours_faster"),
        "fraction of the floor, ours": ours.get("of_floor"),
        "most error, ours": ours.get("max_error"),
    }


KERNEL = Experiment("kernel", KernelConfig, run, check, headline)
