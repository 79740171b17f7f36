"""Scoring: codes and norms of keys, tables of queries, and scores of keys."""
