"""Prefill attention compiled for this machine's processor; see `pallas_kernels.native`."""

from pallas_kernels.native.operands import prefill as prefill_attention
from pallas_kernels.native.operands import unsupported

__all__ = ["prefill_attention", "unsupported"]
