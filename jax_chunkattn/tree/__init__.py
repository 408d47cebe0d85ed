"""The prefix tree, on the host: which chunk holds which tokens, and who uses it."""
