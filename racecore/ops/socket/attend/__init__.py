"""Exact softmax attention: tiles and splits of tokens, gathered rows, online softmax."""
