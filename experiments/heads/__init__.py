"""`heads`: which KV heads must keep all tokens, and what a model loses when the others do not."""
