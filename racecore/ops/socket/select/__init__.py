"""Selection: exact top-k of scores, and exact top-k by bounds of scores."""
