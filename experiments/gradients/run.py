"""The work of `gradients`: both sides compiled, checked against each other, and timed in turns."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.baselines.padded_batch import padded_log_probs
from experiments.gradients.config import GradientsConfig
from experiments.harness.compilations import compilation_cache
from experiments.harness.environment import describe_environment
from experiments.harness.errors import UserError
from experiments.harness.results import ResultFolder
from experiments.harness.units import measure_units
from experiments.harness.views import finish
from experiments.loading import LoadOptions, ModelSource, load_model
from jax_chunkattn import TokenTree, tree_log_probs
from models import LoadedModel


@compilation_cache()
def measure(config: GradientsConfig, source: ModelSource, folder: ResultFolder) -> dict[str, Any]:
    """Run the experiment into `folder`."""
    began = time.perf_counter()
    environment = describe_environment()
    loaded = load_model(source, LoadOptions("float32", config.seed, config.max_positions))
    _check_model(config, loaded)
    folder.begin(environment)
    units = {
        f"{prompt} + {group} x {config.tokens}": functools.partial(
            _point, config, loaded.model, prompt, group
        )
        for prompt, group in itertools.product(config.prompts, config.groups)
    }
    points = measure_units(folder, units, "points")
    summary = {
        "experiment": "gradients",
        **{name: getattr(config, name) for name in ("model", "tokens", "repeats", "seed")},
        "points": points,
        "least_speedup": min(point["speedup"] for point in points),
        "most_speedup": max(point["speedup"] for point in points),
        "largest_difference": max(point["gradient_difference"] for point in points),
        "seconds": round(time.perf_counter() - began, 3),
        "environment": environment,
    }
    return finish(folder, summary)


def _check_model(config: GradientsConfig, loaded: LoadedModel) -> None:
    longest, spec = max(config.prompts) + config.tokens, loaded.model.cache_spec
    if longest > loaded.config.max_positions:
        raise UserError(
            f"--prompts {max(config.prompts)} and --tokens {config.tokens} are more than the "
            f"model's {loaded.config.max_positions:,} positions"
        )
    if spec.softcap is not None or spec.windows is not None:
        raise UserError(
            f"--model {config.model} caps scores or has sliding windows, which "
            "jax.nn.dot_product_attention does not here: choose another to compare with"
        )


def _point(config: GradientsConfig, model: Any, prompt: int, group: int) -> dict[str, Any]:
    """One group, on both sides."""
    random = np.random.default_rng((config.seed, prompt, group))
    shared = random.integers(0, model.vocab_size, prompt)
    own = random.integers(0, model.vocab_size, (group, config.tokens))
    sequences = np.concatenate([np.tile(shared, (group, 1)), own], axis=1).astype(np.int32)
    weights = jnp.asarray(random.standard_normal((group, config.tokens)), jnp.float32)
    tree = TokenTree.of(list(sequences), [prompt] * group)
    params = nnx.state(model)

    def through_tree(params, tree):
        return (tree_log_probs(model, params, tree) * weights).sum()

    def padded(params, sequences):
        return (padded_log_probs(model, params, sequences, prompt=prompt) * weights).sum()

    sides = {
        "tree": _Side(through_tree, params, jax.tree.map(jnp.asarray, tree)),
        "padded": _Side(padded, params, jnp.asarray(sequences)),
    }
    gradients = {name: side.run() for name, side in sides.items()}
    difference = _largest_difference(gradients["tree"][1], gradients["padded"][1])
    del gradients
    for _ in range(config.repeats):
        for side in sides.values():
            side.time()
    pairs = zip(sides["padded"].seconds, sides["tree"].seconds, strict=True)
    return {
        "kind": "point",
        "prompt": prompt,
        "group": group,
        "computed": int(tree.num_tokens),
        "of": sequences.size,
        "seconds": {name: round(statistics.median(s.seconds), 4) for name, s in sides.items()},
        "temporary_bytes": {name: side.temporary_bytes for name, side in sides.items()},
        "speedup": round(statistics.median(slow / fast for slow, fast in pairs), 3),
        "gradient_difference": float(f"{difference:.2g}"),
    }


class _Side:
    """A compiled loss and its gradients.

    Attributes:
      seconds: of each time it was timed.
      temporary_bytes: that XLA allocates beside arguments and results.
    """

    def __init__(self, loss: Callable[..., jax.Array], *arguments: Any) -> None:
        self._compiled = jax.jit(jax.value_and_grad(loss)).lower(*arguments).compile()
        self._arguments = arguments
        analysis = self._compiled.memory_analysis()
        assert analysis is not None, "the CPU's compiler tells"
        self.temporary_bytes = analysis.temp_size_in_bytes
        self.seconds: list[float] = []

    def run(self) -> Any:
        return jax.block_until_ready(self._compiled(*self._arguments))

    def time(self) -> None:
        begin = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - begin)


def _largest_difference(one: Any, other: Any) -> float:
    """Of all weights' gradients, as a share of the norm of the other side's."""
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in leaves)
