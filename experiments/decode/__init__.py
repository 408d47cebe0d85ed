"""`decode`: tokens per second of the jitted decode loop, over one thing that varies."""
