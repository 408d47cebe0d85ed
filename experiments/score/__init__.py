"""`score`: what it takes to say how likely continuations of one prefix are."""
