"""SOCKET on a GPU: the functions of `reference`, one module per stage.

Planes, lengths and counts come from host memory, everything else is on the device. Nothing here
waits for the GPU, except for the copy of a hash's planes at their first use.
"""

from __future__ import annotations

from racecore.ops.socket.attend.cuda import attend_dense, attend_selected
from racecore.ops.socket.score.cuda import hash_keys, query_tables, scores
from racecore.ops.socket.select.cuda import select

__all__ = ["attend_dense", "attend_selected", "hash_keys", "query_tables", "scores", "select"]
