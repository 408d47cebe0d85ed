"""`engine`: what the engine's host work costs, against a bare decode loop."""
