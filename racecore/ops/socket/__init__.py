"""SOCKET (arXiv 2602.06283): hashed keys, their scores for a query, top-k selection, and exact
attention over the selected tokens.
"""
