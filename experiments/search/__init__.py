"""`search`: a beam of forks over one model's answers."""
