from pallas_kernels.prefill_attention.api import IMPLEMENTATIONS, prefill_attention

__all__ = ["IMPLEMENTATIONS", "prefill_attention"]
