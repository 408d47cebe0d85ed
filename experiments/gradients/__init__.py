"""Gradients through a tree of sequences, beside those of a padded batch."""
