"""`models`: architectures, presets, and the memory that they take."""
