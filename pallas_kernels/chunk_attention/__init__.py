from pallas_kernels.chunk_attention.api import CHUNK_ATTENTION, IMPLEMENTATIONS, chunk_attention

__all__ = ["CHUNK_ATTENTION", "IMPLEMENTATIONS", "chunk_attention"]
