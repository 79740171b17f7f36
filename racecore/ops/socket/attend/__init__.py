"""Exact softmax attention over selected or all rows of a cache."""
