"""Time to the first token where a prompt begins with what tiers behind the pool keep."""
