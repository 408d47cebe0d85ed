"""`train-tiny`: a small GPT-2 with many KV heads, trained from scratch on a text."""
