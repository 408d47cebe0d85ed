"""Attention that reads a part of the tokens before it."""
