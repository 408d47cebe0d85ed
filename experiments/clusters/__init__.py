"""`clusters`: how many heads of each layer attend alike, and what it costs to let one do it."""
