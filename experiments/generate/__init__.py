"""`generate`: a model answers a batch of prompts behind one shared prompt."""
