"""Soft locality-sensitive hashing: rows to bucket probabilities, and its gradient."""
