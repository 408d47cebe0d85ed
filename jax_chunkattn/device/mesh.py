"""What a mesh of devices means to an engine: tensor parallelism over its axis `tp`.

As in Megatron-LM (arXiv 1909.08053): each device keeps and reads the keys and values of its KV
heads, with their query heads, and multiplies with its part of each weight. XLA splits the model by
how its weights lie, and adds up what the devices have twice a layer; attention runs on each device
for the heads that are there, so that whatever kernel computes it needs to know of no mesh. Plans,
rows and what is chosen are whole on every device.

Where there are more devices than KV heads, so many of them as an axis `tp_copies` counts keep the
same KV heads, and have the query heads that read them divided among them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jax_chunkattn.device.cache_config import CacheConfig
from jax_chunkattn.device.logical_axes import MeshError, logical_sharding
from jax_chunkattn.device.model_interface import CacheSpec, DecoderModel
from jax_chunkattn.device.programs import SplitModel
from jax_chunkattn.device.request_table import DeviceState
from pallas_kernels.attention_spec import AttentionSpec
from pallas_kernels.coded_kv import LayerKV
from pallas_kernels.head_map import GroupedHeads
from pallas_kernels.implementations import Operation
from pallas_kernels.plans import DecodeReads, PrefillReads

TP = "tp"
COPIES = "tp_copies"

Reads = TypeVar("Reads", DecodeReads, PrefillReads)

log = logging.getLogger(__name__)


def divide(devices: int, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """How many of the devices KV heads are split over, and how many keep the same ones.

    Raises:
      MeshError: for heads that cannot be split over so many.
    """
    if num_kv_heads % devices == 0:
        return devices, 1
    if devices % num_kv_heads or num_heads % devices:
        raise MeshError(
            f"a model of {num_heads} query heads and {num_kv_heads} KV heads cannot be split over "
            f"the {devices} devices of the mesh's axis {TP!r}: KV heads must be a multiple of the "
            "devices, or devices of the KV heads with as many query heads on each"
        )
    return num_kv_heads, devices // num_kv_heads


def mesh_for_heads(mesh: Mesh, num_heads: int, num_kv_heads: int) -> Mesh:
    """The mesh that a model with so many heads is laid over: the same devices in the same order.

    Where `tp` has more devices than there are KV heads it becomes two axes, `tp` and `tp_copies`.
    A mesh without `tp`, or with both, stays as it is.

    Raises:
      MeshError: for heads that cannot be split over its devices.
    """
    if TP not in mesh.shape or COPIES in mesh.shape:
        return mesh
    devices = mesh.shape[TP]
    head_devices, copies = divide(devices, num_heads, num_kv_heads)
    if copies == 1:
        return mesh
    at, shape = mesh.axis_names.index(TP), mesh.devices.shape
    log.info(
        "%d devices and %d KV heads: each KV head is on %d devices, which divide its query heads",
        devices, num_kv_heads, copies,
    )  # fmt: skip
    return Mesh(
        mesh.devices.reshape(*shape[:at], head_devices, copies, *shape[at + 1 :]),
        (*mesh.axis_names[:at], TP, COPIES, *mesh.axis_names[at + 1 :]),
        (*mesh.axis_types[:at], *(mesh.axis_types[at],) * 2, *mesh.axis_types[at + 1 :]),
    )


@dataclass(frozen=True)
class EngineMesh:
    """A mesh that an engine's model, pool and programs are laid over; see `of`."""

    mesh: Mesh

    @classmethod
    def of(cls, mesh: Mesh, spec: CacheSpec) -> EngineMesh:
        """The mesh of an engine for such a model.

        Raises:
          MeshError: for a mesh whose axes are not all `AxisType.Auto`, without `tp`, with another
            axis that has several devices, or that the model's heads cannot be split over.
        """
        other = [kind.name for kind in mesh.axis_types if kind != AxisType.Auto]
        if other:
            raise MeshError(
                f"the mesh has axes that are {other[0]}, and an engine needs Auto ones: "
                "jax.make_mesh(..., axis_types=(AxisType.Auto,))"
            )
        if TP not in mesh.shape:
            raise MeshError(f"an engine's mesh needs an axis {TP!r}, this has {mesh.axis_names}")
        for name, devices in mesh.shape.items():
            if name not in (TP, COPIES) and devices > 1:
                raise MeshError(
                    f"an engine splits its model over {TP!r} alone, and the mesh has {devices} "
                    f"devices along {name!r}"
                )
        laid = mesh_for_heads(mesh, spec.num_heads, spec.num_kv_heads)
        found = cls(laid)
        if spec.num_kv_heads % found.head_devices or spec.num_heads % found.num_devices:
            raise MeshError(
                f"{spec.num_heads} query heads and {spec.num_kv_heads} KV heads cannot be split "
                f"over a mesh of {dict(laid.shape)}"
            )
        return found

    @property
    def num_devices(self) -> int:
        return self.mesh.size

    @property
    def head_devices(self) -> int:
        """Devices that KV heads are split over."""
        return self.mesh.shape[TP]

    @property
    def copies(self) -> int:
        """Devices that keep the same KV heads."""
        return self.mesh.shape.get(COPIES, 1)

    @property
    def waits(self) -> bool:
        """Whether a call must be over before the next is dispatched.

        Devices of one CPU meet in its threads: of 100 calls in flight some held all of them, and
        waited for others (jax 0.10.2 on two cores).
        """
        return self.num_devices > 1 and self.mesh.devices.flat[0].platform == "cpu"

    @cached_property
    def whole(self) -> NamedSharding:
        """Of what every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    def check(
        self, cache: CacheConfig, leaves: Iterable[jax.Array], *, deterministic: bool = False
    ) -> None:
        """Refuses what several devices cannot do together, and a model that lies elsewhere.

        Raises:
          MeshError: with the reason.
        """
        if self.num_devices > 1:
            if cache.clusters is not None:
                raise MeshError(
                    "clusters cannot be split over several devices: a head that attends for "
                    "another's cluster may be on another device"
                )
            if cache.selector is not None:
                raise MeshError(
                    f"the selector {cache.selector.name!r} cannot be split over several devices: "
                    "what a query reads is chosen by the scores of all heads"
                )
            if deterministic:
                raise MeshError(
                    "deterministic engines are of one device: what several add up together has "
                    "other last bits"
                )
        for array in leaves:
            place = array.sharding
            if isinstance(place, NamedSharding) and place.mesh == self.mesh:
                continue
            if self.num_devices == 1 and place.device_set == {self.mesh.devices.item()}:
                continue
            raise MeshError(
                f"the model's weights do not lie on the engine's mesh of {self.num_devices} "
                "devices: load the model with the same mesh, models.load(..., mesh=mesh)"
            )

    def own_heads(self, heads: GroupedHeads) -> GroupedHeads:
        """Those of one device."""
        return GroupedHeads(
            heads.query_heads // self.num_devices, heads.kv_heads // self.head_devices
        )

    def own_spec(self, spec: CacheSpec) -> CacheSpec:
        """What one device keeps of a token, without windows: those depend on the device."""
        heads = self.own_heads(spec.attention.heads)
        return replace(spec, num_heads=heads.query_heads, num_kv_heads=heads.kv_heads, windows=None)

    def places(self, state: DeviceState) -> Any:
        """How the arrays of a state lie, or those of its shapes.

        Of the pool a device has all chunks of its KV heads. It counts the tokens whose logits it
        computes; the rest of the table is whole.
        """
        whole_counts = state.table.counts.generated.shape[1] % self.num_devices

        def place(path: tuple[Any, ...], array: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
            match [key.name for key in path[:2]]:
                case ["pool", _]:
                    axes = state.pool.AXES[: array.ndim]
                case ["table", "counts"] if not whole_counts:
                    axes = (None, "vocab")
                case _:
                    axes = ()
            axes = (*axes, *(None,) * (array.ndim - len(axes)))
            return logical_sharding(axes, array.shape, self.mesh)

        return jax.tree_util.tree_map_with_path(place, state)

    def attend(
        self,
        operation: Operation[Reads],
        q: Float[Array, "rows Hq D"],
        stored: LayerKV,
        reads: Reads,
        attention: AttentionSpec,
        *,
        implementation: str | None,
    ) -> Float[Array, "rows Hq D"]:
        """As `operation.attend`, each device for its own heads."""
        own = replace(attention, heads=self.own_heads(attention.heads))

        def on_device(
            q: Float[Array, "rows Hq D"], stored: LayerKV, reads: Reads
        ) -> Float[Array, "rows Hq D"]:
            return operation.attend(q, stored, reads, own, implementation=implementation)

        if self.copies > 1:  # else XLA divides the product that they come from, and shuffles
            q = lax.with_sharding_constraint(q, NamedSharding(self.mesh, _OF_HEADS))
        of_queries = PartitionSpec(None, self._query_axes)
        return jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(of_queries, _of_stored(stored), _of_reads(reads)),
            out_specs=of_queries,
            check_vma=False,  # neither kernels nor while loops have rules for it
        )(q, stored, reads)

    @property
    def _query_axes(self) -> tuple[str, ...]:
        return (TP, COPIES) if COPIES in self.mesh.shape else (TP,)


def lay_over(
    mesh: Mesh | None, model: DecoderModel, cache: CacheConfig, *, deterministic: bool
) -> EngineMesh | None:
    """The mesh of an engine for a model, cache and options; None for an engine on one device.

    Raises:
      MeshError: for what cannot be laid over it, or a model on several devices without one.
    """
    leaves = [leaf for leaf in SplitModel.of(model).leaves if isinstance(leaf, jax.Array)]
    if mesh is None:
        devices = {device for array in leaves for device in array.sharding.device_set}
        if len(devices) > 1:
            raise MeshError(
                f"the model's weights are on {len(devices)} devices: give the engine their mesh, "
                "Engine(..., mesh=mesh)"
            )
        return None
    if cache.has_tiers:
        raise MeshError("host_memory and disk are not for engines on a mesh yet")
    found = EngineMesh.of(mesh, model.cache_spec)
    found.check(cache, leaves, deterministic=deterministic)
    return found


def attend_with(
    operation: Operation[Reads],
    q: Float[Array, "rows Hq D"],
    stored: LayerKV,
    reads: Reads,
    attention: AttentionSpec,
    *,
    implementation: str | None,
    mesh: EngineMesh | None,
) -> Float[Array, "rows Hq D"]:
    """Attention on one device, or on the devices of a mesh."""
    if mesh is None:
        return operation.attend(q, stored, reads, attention, implementation=implementation)
    return mesh.attend(operation, q, stored, reads, attention, implementation=implementation)


_WHOLE = PartitionSpec()
_OF_HEADS = PartitionSpec(None, TP)


def _of_stored(stored: LayerKV) -> Any:
    """The axes of a layer's arrays: KV heads behind layers, but for the layer's number."""
    return jax.tree.map(lambda array: _OF_HEADS if jnp.ndim(array) > 1 else _WHOLE, stored)


def _of_reads(reads: DecodeReads | PrefillReads) -> Any:
    """The axes of what is read: plans are whole, and what else there is has KV heads."""

    def axes(path: tuple[Any, ...], _: Any) -> PartitionSpec:
        match [getattr(key, "name", None) for key in path]:
            case ["head_windows"]:
                return PartitionSpec(TP)
            case ["own" | "new", "keys" | "values"]:
                return _OF_HEADS
        return _WHOLE

    return jax.tree_util.tree_map_with_path(axes, reads)
