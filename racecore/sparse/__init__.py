"""Sparse decoding: an index of the keys of a cache, and attention over the tokens it selects."""

from racecore.sparse.decode import sparse_attention
from racecore.sparse.socket_index import SocketIndex

__all__ = ["SocketIndex", "sparse_attention"]

# Pickles name a class by its module: this one stays, whichever module of the folder has the class.
SocketIndex.__module__ = __name__
