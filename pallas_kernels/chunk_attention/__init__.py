from pallas_kernels.chunk_attention.api import IMPLEMENTATIONS, chunk_attention

__all__ = ["IMPLEMENTATIONS", "chunk_attention"]
