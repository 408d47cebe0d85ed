"""Two-phase attention compiled for this machine's processor; see `pallas_kernels.native`."""

from pallas_kernels.native.operands import decode as chunk_attention
from pallas_kernels.native.operands import unsupported

__all__ = ["chunk_attention", "unsupported"]
