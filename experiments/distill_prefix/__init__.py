"""`distill-prefix`: a learned prefix that is trained to stand for a system prompt."""
