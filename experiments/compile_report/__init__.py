"""Compiling programs for a GPU that is not there, and reading what came out.

JAX's CUDA plugin compiles without a driver when it is given a description of the device. What it
makes is the machine code a GPU would run, so registers, spills, shared memory and copies of the
pool can be known, and asserted, on any Linux machine. Numbers and speed cannot.
"""
