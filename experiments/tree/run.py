"""The work of `tree`: one question after another."""

from __future__ import annotations

from typing import Any

from experiments.harness.environment import describe_deviceless
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.tree.config import TreeConfig
from experiments.tree.planning import measure_planning
from experiments.tree.synthetic import measure_children, measure_growth


def measure(config: TreeConfig, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    environment = describe_deviceless()
    folder.begin(environment)
    units = {
        "growth": lambda: _growth(config),
        **{
            f"{count} children": lambda count=count: {
                "kind": "children",
                **measure_children(config, count),
            }
            for count in config.children
        },
        "planning": lambda: {"kind": "planning", "plans": measure_planning(config)},
    }
    growth, *children, planning = measure_units(folder, units, "tree")
    summary = {
        "experiment": "tree",
        **{name: getattr(config, name) for name in ("chunk_size", "prompt_tokens", "samples")},
        "seed": config.seed,
        **{name: growth[name] for name in ("sizes", "bytes_per_node", "evict_microseconds")},
        "children": children,
        "planning": planning["plans"],
        "environment": environment,
    }
    return finish(folder, summary)


def _growth(config: TreeConfig) -> dict[str, Any]:
    sizes, bytes_per_node, evict = measure_growth(config)
    return {
        "kind": "growth",
        "sizes": sizes,
        "bytes_per_node": bytes_per_node,
        "evict_microseconds": evict,
    }
