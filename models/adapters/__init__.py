"""Decoders and engines behind the interfaces of other libraries; none is imported by the others."""
