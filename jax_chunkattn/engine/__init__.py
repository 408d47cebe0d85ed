"""Continuous batching over one chunk pool: requests, scheduling, and calls to the device."""
