"""`grpo`: a small policy that learns from its own samples, with rollouts by the engine."""
