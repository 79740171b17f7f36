"""The best tokens of a row of scores: exact top-k, and top-k by bounds of scores."""
