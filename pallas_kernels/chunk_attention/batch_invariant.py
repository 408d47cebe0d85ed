"""Two-phase attention of the compiled kernel, the same bits for a query in any company.

Each query reads its tokens in the order of their sequence, in blocks that are those of chunks,
whatever the plan shares: see `pallas_kernels.products`.
"""

from functools import partial

from pallas_kernels.native.operands import decode
from pallas_kernels.native.operands import unsupported_invariant as unsupported

chunk_attention = partial(decode, batch_invariant=True)

__all__ = ["chunk_attention", "unsupported"]
