"""Scores of all keys from their codes."""
