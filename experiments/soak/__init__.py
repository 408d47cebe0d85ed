"""The parts of `soak`: random work, an account of it, what must hold, and how it is shown."""
