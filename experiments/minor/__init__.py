"""`minor`: what a long generation could drop of its own tokens beside a shared prefix."""
