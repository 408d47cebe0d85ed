"""`tree`: what the prefix tree and the planner cost on the host."""
