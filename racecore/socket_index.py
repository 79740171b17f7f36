"""The module that pickles of version 0.1 name for `SocketIndex`; nothing else imports it."""

from racecore.sparse.socket_index import SocketIndex

__all__ = ["SocketIndex"]
