"""SOCKET on a GPU: the top-k tokens of every row of scores, by `select_tokens` of selection.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from racecore.ops.cuda.call import empty
from racecore.ops.socket.cuda_launch import SELECTION_FILE, launch, whole_blocks
from racecore.ops.socket.layout import HashedKeys
from racecore.ops.socket.score.cuda import score_pairs
from racecore.runtime import cuda

__all__ = ["select"]

# values of a digit of a score, and adjacent tokens of a thread, as in selection.cu
_BINS, _TOKENS_PER_THREAD = 256, 8
# scores in memory at a time
_SCORE_BYTES = 256 << 20


def select(
    tables: np.ndarray,
    keys: HashedKeys,
    multiplies: bool,
    budgets: np.ndarray,
    ends: tuple[int, int],
    is_shared: bool,
) -> np.ndarray:
    """Return the tokens to attend to, int64 [B, H, W]: ascending, unique, padded with -1.

    W is an upper bound for the longest sequence: the overlap of top-k, sink and window is known on
    the GPU only.
    """
    batch, n_kv_heads = keys.codes.shape[:2]
    rows_per_pair = 1 if is_shared else tables.shape[1] // n_kv_heads
    sink, window = ends
    width = int(
        np.minimum(keys.lengths, np.minimum(budgets, keys.lengths) + sink + window).max(initial=0)
    )
    longest = int(keys.lengths.max(initial=0))
    selected = empty((batch * n_kv_heads * rows_per_pair, width), np.int64)
    lengths, device_budgets = cuda.to_device(keys.lengths), cuda.to_device(budgets)
    at_once = max(
        1, _SCORE_BYTES // max(1, whole_blocks(longest) * rows_per_pair * tables.dtype.itemsize)
    )
    for start in range(0, batch * n_kv_heads if width else 0, at_once):
        pairs = range(start, min(start + at_once, batch * n_kv_heads))
        score = empty((len(pairs) * rows_per_pair, whole_blocks(longest)), tables.dtype)
        score_pairs(tables, keys, multiplies, lengths, pairs, is_shared, score)
        _write_top_k(
            score,
            lengths,
            device_budgets,
            ends,
            start * rows_per_pair,
            n_kv_heads * rows_per_pair,
            selected,
        )
    return selected.reshape(batch, n_kv_heads * rows_per_pair, width)


def _write_top_k(
    score: Any,
    lengths: Any,
    budgets: Any,
    ends: tuple[int, int],
    first_row: int,
    rows_per_sequence: int,
    selected: Any,
) -> None:
    """Write the top-k of scores [rows, whole blocks] to selected [all rows, W], from first_row."""
    n_rows, width = score.shape
    threads = min(1024, -(-width // (_TOKENS_PER_THREAD * cuda.LANES)) * cuda.LANES)
    call = cuda.structure(
        [
            ("scores", score.data.ptr),
            ("lengths", lengths.data.ptr),
            ("budgets", budgets.data.ptr),
            ("selected", selected.data.ptr),
            ("first_row", first_row),
            ("n_rows", n_rows),
            ("rows_per_sequence", rows_per_sequence),
            ("width", width),
            ("sink", ends[0]),
            ("window", ends[1]),
            ("n_selected", selected.shape[1]),
        ]
    )
    shared = (_BINS + threads // cuda.LANES) * 4
    launch(SELECTION_FILE, "select_tokens", score.dtype, 1, n_rows, threads, shared, call)
