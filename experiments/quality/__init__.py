"""`quality`: perplexity through the cache against a plain forward pass."""
