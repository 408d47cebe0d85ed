"""Does a compiled program copy the pool? Read off the program XLA made, without running it.

Three signs: temporaries as large as a layer's pool, pools that are not aliased to results, and
operations that make an array as large. Works on programs for CPU and GPU.
"""

from __future__ import annotations

from experiments.compile_report.hlo import Module, Operation

# These make no array of their own. What an asynchronous operation makes is counted at its start.
_NO_WORK = {
    "parameter",
    "get-tuple-element",
    "bitcast",
    "tuple",
    "while",
    "conditional",
    "call",
    "opt-barrier",
    "optimization-barrier",
}
_IN_PLACE = {"scatter", "dynamic-update-slice"}


def pool_copies(
    *, hlo: str, temporary_bytes: int, aliased_bytes: int, pool_bytes: int, layer_bytes: int
) -> list[str]:
    """Why the program is held to copy the pool; nothing when it updates the pool in place.

    Args:
      hlo: the optimised module.
      temporary_bytes, aliased_bytes: as `memory_analysis()` of the compiled program tells.
      pool_bytes: of the keys and values of all layers.
      layer_bytes: of one layer's keys; the batch's own arrays must be smaller.
    """
    signs = []
    if temporary_bytes >= layer_bytes:
        signs.append(f"temporaries of {temporary_bytes} bytes, a layer's keys are {layer_bytes}")
    if aliased_bytes < pool_bytes:
        signs.append(f"{aliased_bytes} bytes are updated in place, the pool has {pool_bytes}")
    return signs + pool_sized_operations(hlo, layer_bytes)


def pool_sized_operations(hlo: str, min_bytes: int) -> list[str]:
    """Operations outside fusions that make a new array of at least `min_bytes`.

    Left out is what writes into its operand: scatters and dynamic update slices, fused or not, and
    custom calls' results that are aliased to an operand.
    """
    module = Module(hlo)
    return [
        f"{operation.kind} {array} in {computation}"
        for computation, operation in module.unfused()
        if operation.kind not in _NO_WORK and not operation.kind.endswith("-done")
        for index, array in enumerate(operation.results)
        if array.nbytes >= min_bytes and not _in_place(module, operation, index)
    ]


def _in_place(module: Module, operation: Operation, index: int) -> bool:
    """Whether result `index` of an operation is written over one of its operands."""
    if operation.kind in _IN_PLACE:
        return True
    if operation.kind == "custom-call":
        return index in operation.aliased_results
    if operation.kind not in ("fusion", "fusion-start"):
        return False
    body = module.computations.get(operation.attribute("calls") or "", [])
    by_name = {one.name: one for one in body}
    written = next((one for one in body if one.is_root), None)
    if written is not None and written.kind == "tuple":
        written = by_name.get(written.operands[index])
    # Back from the result to where its array comes from: nothing but writes may lie between.
    writes = 0
    while written is not None and written.kind in ("bitcast", *_IN_PLACE):
        writes += written.kind in _IN_PLACE
        written = by_name.get(written.operands[0])
    return writes > 0 and written is not None and written.kind == "parameter"
