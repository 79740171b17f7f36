"""SOCKET: bits of keys, scores of a query, the best tokens, exact attention over them (arXiv
2602.06283).
"""
