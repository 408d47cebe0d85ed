"""Attention compiled for this machine's processor: C++ behind XLA's foreign function interface."""
