from pallas_kernels.prefill_attention.api import (
    IMPLEMENTATIONS,
    PREFILL_ATTENTION,
    prefill_attention,
)

__all__ = ["IMPLEMENTATIONS", "PREFILL_ATTENTION", "prefill_attention"]
