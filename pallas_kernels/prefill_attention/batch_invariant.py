"""Prefill attention of the compiled kernel, the same bits for a query in any company.

Each query reads its tokens in the order of their sequence, in blocks that are those of chunks,
whatever the plan shares: see `pallas_kernels.products`.
"""

from functools import partial

from pallas_kernels.implementations import AttentionShapes
from pallas_kernels.native import operands

prefill_attention = partial(operands.prefill, batch_invariant=True)


def unsupported(shapes: AttentionShapes) -> str | None:
    """Why it cannot read such a pool, if it cannot."""
    if shapes.chosen:
        return "what tokens choose to read depends on sums that are not batch-invariant"
    return operands.unsupported(shapes)
