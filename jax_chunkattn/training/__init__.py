"""Losses over sequences that share prefixes, with gradients."""
