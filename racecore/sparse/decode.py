"""Sparse attention for decoding: score all tokens by their bits, attend exactly to the best."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from racecore import backends, outputs
from racecore.inputs import Passed
from racecore.runtime import cuda
from racecore.sparse import checks
from racecore.sparse.socket_index import SocketIndex

__all__ = ["sparse_attention"]


def sparse_attention(
    query: Any,
    key: Any,
    value: Any,
    index: SocketIndex | None,
    *,
    budget: int | float,
    sink: int = 128,
    window: int = 128,
    group_selection: str = "head",
    lengths: Any = None,
    backend: str | None = None,
    out: Any = None,
) -> Any:
    """Compute softmax attention of one token over selected tokens of a cache (SOCKET).

    Several queries at once (a prefill), and sequences of no more tokens than `budget`, get dense,
    causal, exact attention: the queries are the last tokens of their sequences, and each sees
    itself and the tokens before it.

    Parameters
    ----------
    query : array, shape [B, Tq, H, D]
    key : array, shape [B, T, G, D]
    value : array, shape [B, T, G, V]
        The cache, including the query's token: all of one dtype, float16, bfloat16, float32 or
        float64. Any strides; memory maps are read row by row, and nothing of size T is copied (but
        arrays in a foreign byte order, or not aligned). Without a batch axis all three mean B = 1.
        H must be a multiple of G.
    index : SocketIndex or None
        An index of every token of the cache, on the device of the cache. None: dense attention for
        any number of tokens.
    budget : int or float
        Tokens chosen by score: a number, or a share of each sequence, rounded up.
    sink, window : int
        How many of the first and of the last tokens to attend to in any case. If both are 0, the
        last one is.
    group_selection : {"head", "group"}
        Whether every query head selects tokens, or the heads of a key/value head select together;
        see `SocketIndex.select`.
    lengths : integers, shape [B], optional
        How many tokens of each sequence are in use, for a cache with spare capacity; must be those
        of the index.
    backend : {"cpu", "cuda", "reference"}, optional
        None takes the fastest for the device of the arrays. "cuda" copies arrays in host memory to
        the GPU first.
    out : array, shape [B, Tq, H, V], optional
        Array for the result.

    Returns
    -------
    array, shape [B, Tq, H, V]
        ``softmax(q k^T / sqrt(D)) v`` over the selected tokens, in the query's dtype and library.
        Zero for a sequence without tokens.

    Raises
    ------
    ValueError, TypeError
        The message says what was expected, what came and what to do. Nothing has been changed.
    racecore.errors.BackendUnavailableError
        The backend cannot run here; lists every backend with its reason.

    Notes
    -----
    Source: SOCKET (arXiv 2602.06283). Results have the same bits for any number of threads, and the
    same in a batch of sequences of several lengths as one by one. On a GPU the work goes to CuPy's
    current stream, and nothing waits for it.

    Examples
    --------
    >>> import numpy as np
    >>> import racecore
    >>> rng = np.random.default_rng(0)
    >>> key, value = (rng.standard_normal((1, 5000, 2, 64), dtype=np.float32) for _ in range(2))
    >>> index = SocketIndex(racecore.SoftLSH.random(head_dim=64, n_tables=60, n_planes=8, rng=0))
    >>> index.append(key, value)
    >>> query = rng.standard_normal((1, 1, 8, 64), dtype=np.float32)
    >>> sparse_attention(query, key, value, index, budget=0.05).shape
    (1, 1, 8, 64)
    """
    choice = checks.check_choice(budget, sink, window, group_selection)
    passed = Passed.resolve(query, key, value, backends.needs_device(backend))
    d = checks.check_decoding(passed, checks.described(index), lengths)
    on_device = cuda.is_array(d.query)
    operations = backends.choose(backend, on_device).socket
    shape = (*d.query.shape[:3], d.value.shape[3])
    sources = [("query", d.query), ("key", d.key), ("value", d.value)]
    result, target, give_back = outputs.result_array(out, passed.query, shape, sources, on_device)
    budgets = choice.budgets(d.lengths)
    # Neighbours of one kind are computed together: a batch of one kind is one call.
    is_dense = (budgets >= d.lengths) | (index is None or d.query.shape[1] != 1)
    for dense, run in groupby(range(len(is_dense)), key=lambda b: bool(is_dense[b])):
        sequences = list(run)
        some = slice(sequences[0], sequences[-1] + 1)
        rows = (d.query[some], d.key[some], d.value[some])
        if dense or index is None or index.hashed is None:
            operations.attend_dense(*rows, d.lengths[some], target[some])
        else:
            hashed = index.hashed
            part = hashed._replace(
                codes=hashed.codes[some], norms=hashed.norms[some], lengths=hashed.lengths[some]
            )
            selected = index.chosen(operations, rows[0], part, choice)
            operations.attend_selected(*rows, selected, target[some])
    return give_back(result)
