"""Tests run on the CPU, also where there is a GPU: what they assert of numbers, programs and times
is said of CPUs. For a GPU there is `python -m experiments gpu`."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # before anything imports jax
