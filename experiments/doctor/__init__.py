"""`doctor`: what this machine can run, and the next command to type."""
