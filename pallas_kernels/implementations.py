"""Which implementation of an operation runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Generic, TypeVar

import jax

# Here and not with the kernels: importing it adds to JAX's configuration, after which whatever was
# traced before is traced and compiled again.
import jax.experimental.pallas
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import native
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.clusters import ClusteredKV
from pallas_kernels.codecs import ChunkCodec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.plans import DecodeReads, HostOrDevice, PrefillReads, check_sizes, check_windows
from pallas_kernels.targets import Target, current_target

PREFERENCE = ("pallas_mosaic_gpu", "pallas_triton", "native", "xla")
"""The first of these that runs is what `implementation=None` means."""
NATIVE = "native"
BATCH_INVARIANT = "batch_invariant"
COMPILED_HERE = (NATIVE, BATCH_INVARIANT)
"""Those of the kernel that is compiled for this machine's CPU."""


Reads = TypeVar("Reads", DecodeReads, PrefillReads)


class ImplementationError(ValueError):
    """An implementation that is not known, or cannot run here; the message says why."""


@dataclass(frozen=True)
class AttentionShapes:
    """What decides whether a kernel exists for a call.

    Attributes:
      dtype: of the pool, or of what is read exactly where it is encoded; the Pallas kernels round
        queries to it.
      group: query heads for each KV head, G.
      head_dim: D.
      chunk_size: C.
      codec: what chunks are encoded by, if they are.
      chosen: whether rows may read a part of an item's chunks.
      clustered: whether heads of a cluster have their keys in common.
    """

    dtype: str
    group: int
    head_dim: int
    chunk_size: int
    codec: ChunkCodec | None = None
    chosen: bool = False
    clustered: bool = False

    @classmethod
    def of(
        cls,
        q: Float[HostOrDevice, "rows Hq D"],
        stored: LayerKV,
        reads: DecodeReads | PrefillReads,
        attention: AttentionSpec,
    ) -> AttentionShapes:
        """Of an attention and its operands.

        Raises:
          ValueError: for heads that are not the attention's, or a head_dim that differs from the
            pool's.
        """
        heads = attention.heads
        if q.shape[-1] != stored.head_dim:
            raise ValueError(f"queries have head_dim {q.shape[-1]}, the pool has {stored.head_dim}")
        if (q.shape[1], stored.kv_heads) != (heads.query_heads, heads.kv_heads):
            raise ValueError(
                f"there are {q.shape[1]} query heads and {stored.kv_heads} KV heads, and the "
                f"attention is of {heads.query_heads} and {heads.kv_heads}"
            )
        sizes = heads.group, stored.head_dim, stored.chunk_size
        chosen = reads.plan.items.chosen is not None
        return cls(
            str(exact_dtype(stored, reads)),
            *sizes,
            stored.codec,
            chosen,
            isinstance(stored, ClusteredKV),
        )


def exact_dtype(stored: LayerKV, reads: DecodeReads | PrefillReads) -> jnp.dtype:
    """The dtype of the keys and values that are not encoded, or that all are decoded to."""
    exact = reads.own if isinstance(reads, DecodeReads) else reads.new
    return stored.dtype if exact is None else exact.keys.dtype


@dataclass(frozen=True)
class Operation(Generic[Reads]):
    """Attention to the pool, with several implementations, each in a module of its name.

    Attributes:
      package: where the modules are. Each has a function with the operation's name, that takes
        `(q, stored, reads, attention)` and, in those of kernels, `interpret`; and those of kernels
        have a function `unsupported(shapes) -> str | None`.
      name: of the operation.
      implementations: names that may be asked for.
    """

    package: str
    name: str
    implementations: tuple[str, ...]

    def attend(
        self,
        q: Float[HostOrDevice, "rows Hq D"],
        stored: LayerKV,
        reads: Reads,
        attention: AttentionSpec,
        *,
        implementation: str | None = None,
    ) -> Float[Array, "rows Hq D"]:
        """The output of an implementation, or of the best that runs here for None.

        Raises:
          ImplementationError: for an implementation that is unknown or cannot run here.
          ValueError: for queries or keys that are not the attention's, or a plan of other rows or
            without what the implementation needs.
        """
        check_windows(reads)
        check_sizes(q.shape[0], attention.heads.kv_heads, reads)
        shapes = AttentionShapes.of(q, stored, reads, attention)
        name = self.resolve(implementation, shapes)
        if shapes.chosen and name in (*COMPILED_HERE, "xla"):
            raise ValueError(
                f"rows of the plan read parts of items, which {name!r} does not: it reads what "
                "they have chosen as tiles, of a plan without partials"
            )
        return _attend(
            q,
            stored,
            reads,
            function=self.function(name),
            attention=attention,
            interpret=needs_partials(name) and current_target().interpret,
        )

    def function(self, implementation: str) -> Callable[..., jax.Array]:
        """The function of an implementation. Kernels' modules are imported when first used."""
        return getattr(import_module(f"{self.package}.{implementation}"), self.name)

    def resolve(self, implementation: str | None, shapes: AttentionShapes) -> str:
        """The name to run: the one asked for, or the best on this device for None.

        Raises:
          ImplementationError: for a name that is not known, or that cannot run here, with the
            reason; nothing is ever substituted.
        """
        if implementation is None:
            candidates = [name for name in PREFERENCE if name in self.implementations]
            return next(name for name in candidates if self._problem(name, shapes) is None)
        check_known(implementation, self.implementations)
        _refuse_for(implementation, self._problem(implementation, shapes))
        return implementation

    def _problem(self, implementation: str, shapes: AttentionShapes) -> str | None:
        if not is_kernel(implementation):
            return None
        problem = _device_problem(implementation, current_target())
        if problem is not None:
            return problem
        try:
            module = import_module(f"{self.package}.{implementation}")
        except ImportError as error:
            return f"jax {jax.__version__} does not have what it needs: {error}"
        return module.unsupported(shapes)


@functools.partial(jax.jit, static_argnames=("function", "attention", "interpret"), inline=True)
def _attend(
    q: Float[Array, "rows Hq D"],
    stored: LayerKV,
    reads: DecodeReads | PrefillReads,
    *,
    function: Callable[..., jax.Array],
    attention: AttentionSpec,
    interpret: bool,
) -> Float[Array, "rows Hq D"]:
    options = {"interpret": True} if interpret else {}
    return function(q, stored, reads, attention, **options)


def needs_partials(implementation: str) -> bool:
    """Whether plans for it must have slots for partials."""
    return implementation.startswith("pallas")


def is_kernel(implementation: str) -> bool:
    """Whether it may be unable to run here: its module then says for what shapes."""
    return implementation in COMPILED_HERE or needs_partials(implementation)


def check_device(implementation: str | None) -> None:
    """Raises ImplementationError where no shapes would let an implementation run."""
    if implementation is not None and is_kernel(implementation):
        _refuse_for(implementation, _device_problem(implementation, current_target()))


def check_known(implementation: str, known: Collection[str]) -> None:
    """Raises ImplementationError for a name that is not among the known ones."""
    if implementation not in known:
        raise ImplementationError(
            f"unknown implementation {implementation!r}; known: {', '.join(sorted(known))}"
        )


def _refuse_for(implementation: str, problem: str | None) -> None:
    if problem is not None:
        raise ImplementationError(f"implementation {implementation!r} cannot run: {problem}")


def _device_problem(implementation: str, target: Target) -> str | None:
    if implementation in COMPILED_HERE:
        return native.problem_on(target)
    if target.compute_capability is None:
        return f"it needs an NVIDIA GPU, and the device is {target.name!r}"
    major, minor = target.compute_capability
    found = f"{target.name!r} has {major}.{minor}"
    if implementation == "pallas_mosaic_gpu" and major != 9:
        return f"it needs compute capability 9 (Hopper), and {found}"
    if major < 8:
        return f"it needs compute capability 8 (Ampere) or later, and {found}"
    return None
