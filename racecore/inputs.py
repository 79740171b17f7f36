"""The checks of an attention call, and their messages: the arguments in, one frozen `Problem` out.

`outputs` checks arrays for results, `gradient_inputs` the arguments of gradients.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from racecore import chunking
from racecore.problem import DEVICE_WORKSPACE_BYTES, WORKSPACE_BYTES, Problem
from racecore.runtime import arrays, cuda
from racecore.runtime.arrays import CallerArray
from racecore.soft_lsh import SoftLSH

__all__ = [
    "READOUTS",
    "Passed",
    "check_attention",
    "check_dtypes",
    "check_readout",
    "check_shapes",
    "checked_mask",
    "parse_bytes",
    "whole_sequences",
]

READOUTS = ("ratio", "bucket_mean")
_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


class Passed(NamedTuple):
    """The rows of a call as the caller passed them: shapes, devices, and the way back."""

    query: CallerArray
    key: CallerArray
    value: CallerArray

    @classmethod
    def resolve(cls, query: Any, key: Any, value: Any, on_device: bool | None = None) -> Passed:
        """Resolve the three, to compute on a GPU or not; None means on the device they are on."""
        return cls(*arrays.resolve(on_device, query=query, key=key, value=value))


def check_attention(
    passed: Passed,
    lsh: SoftLSH | None,
    *,
    is_causal: bool,
    readout: str,
    key_mask: Any = None,
    cu_seqlens: Any = None,
    chunk_size: int | None = None,
    memory_limit: int | str | None = None,
) -> tuple[Problem, SoftLSH]:
    """Check the arguments of `racecore.attention`.

    Returns
    -------
    problem : Problem
        With 4-D arrays.
    lsh : SoftLSH
        The hash, the default one if None was passed.
    """
    # [B, Tq, H, D], [B, Tk, G, D], [B, Tk, G, V]
    q, k, v = check_shapes(passed)
    check_dtypes(query=q, key=k, value=v)
    lsh = _checked_lsh(lsh, q.shape[3], q.shape[2])
    check_readout(readout)
    if not isinstance(is_causal, (bool, np.bool_)):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    if is_causal and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"is_causal needs as many queries as keys, got Tq = {q.shape[1]} and Tk = "
            f"{k.shape[1]}; to continue a "
            "sequence, pass the new tokens alone and the past as initial_state"
        )
    mask = checked_mask(key_mask, k)
    if mask is not None and cu_seqlens is not None:
        raise ValueError(
            "key_mask and cu_seqlens were both given; use one: drop the masked tokens and adapt "
            "cu_seqlens"
        )
    sequences = _sequence_table(cu_seqlens, q, k)
    # one state per query head if planes or beta differ per query head, else per key/value head
    per_head = lsh.n_heads is not None
    planes, beta = lsh.per_head(q.shape[2] if per_head else k.shape[2])
    _check_chunk_size(chunk_size, memory_limit)
    problem = Problem(
        query=q,
        key=k,
        value=v,
        planes=planes,
        beta=beta,
        key_mask=mask,
        sequences=sequences,
        n_heads=q.shape[2],
        n_kv_heads=k.shape[2],
        value_dim=v.shape[3],
        is_causal=bool(is_causal),
        readout=readout,
        dtype=arrays.compute_dtype(q.dtype),
        chunk_tokens=None if chunk_size is None else int(chunk_size),
        workspace_bytes=DEVICE_WORKSPACE_BYTES if cuda.is_array(q) else WORKSPACE_BYTES,
    )
    if memory_limit is not None:
        problem = _limited(problem, parse_bytes(memory_limit))
    elif problem.is_causal and chunk_size is None and chunking.can_keep_states(problem):
        problem = replace(problem, keeps_states=True)
    return problem, lsh


def check_shapes(passed: Passed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check the shapes of query, key and value with each other; return the arrays, 4-D."""
    q, k, v = (x.array for x in passed)
    shapes = f"query {q.shape}, key {k.shape}, value {v.shape}"
    if not (q.ndim == k.ndim == v.ndim and q.ndim in (3, 4)):
        raise ValueError(
            "query, key and value must all be [B, T, heads, dim], or all [T, heads, dim] without "
            f"a batch axis; got {shapes}"
        )
    if not passed.query.had_batch:
        q, k, v = q[None], k[None], v[None]
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"query, key and value must have the same batch size; got {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"key and value must agree in tokens and heads; got {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"query and key must have the same head dim D (last axis); got {shapes}")
    if 0 in (q.shape[2], k.shape[2], q.shape[3], v.shape[3]):
        raise ValueError(f"heads and head dims must not be 0 (tokens and batch may); got {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the {q.shape[2]} query heads must be a multiple of the {k.shape[2]} key/value heads "
            "(axis order is "
            f"[batch, tokens, heads, dim]); got {shapes}"
        )
    return q, k, v


def check_readout(readout: str) -> None:
    """Check the name of a readout."""
    if not isinstance(readout, str) or readout not in READOUTS:
        raise ValueError(
            f"readout must be one of {', '.join(map(repr, READOUTS))}, got {readout!r}"
        )


def check_dtypes(**named: np.ndarray) -> None:
    """Check that arrays have one dtype, and one that kernels read."""
    for name, array in named.items():
        if not arrays.is_supported(array.dtype):
            raise TypeError(
                f"{name} must be {arrays.DTYPE_NAMES}, got {array.dtype}; convert it with "
                ".astype(numpy.float32)"
            )
    dtypes = [array.dtype for array in named.values()]
    if len(set(dtypes)) > 1:
        raise TypeError(
            f"{', '.join(named)} must have one dtype, got {', '.join(map(str, dtypes))}; convert "
            "them with .astype"
        )


def _checked_lsh(lsh: SoftLSH | None, head_dim: int, n_heads: int) -> SoftLSH:
    if lsh is None:
        return _default_lsh(head_dim)
    if not isinstance(lsh, SoftLSH):
        raise TypeError(f"lsh must be a racecore.SoftLSH or None, got {type(lsh).__qualname__}")
    if lsh.head_dim != head_dim:
        raise ValueError(
            f"lsh hashes rows of {lsh.head_dim} values, query and key have {head_dim}; make one "
            f"for {head_dim}"
        )
    if lsh.n_heads not in (None, n_heads):
        raise ValueError(
            f"lsh has planes or beta for {lsh.n_heads} query heads, the query has {n_heads}"
        )
    return lsh


@lru_cache(maxsize=8)
def _default_lsh(head_dim: int) -> SoftLSH:
    """Return the hash of a call without one."""
    # drawing it takes longer than a short call
    return SoftLSH.random(head_dim=head_dim, n_tables=4, n_planes=4, beta=1.0, rng=0)


def checked_mask(key_mask: Any, k: np.ndarray) -> np.ndarray | None:
    """Return the mask of keys k [B, Tk, G, D] on their device, bool [B, Tk]; None stays None."""
    if key_mask is None:
        return None
    mask = arrays.to_device(arrays.as_array(key_mask, "key_mask"), cuda.is_array(k))
    if mask.dtype != np.bool_:
        raise TypeError(
            f"key_mask must be bool (True = the key takes part), got {mask.dtype}; compare it to "
            "get bools"
        )
    batch, n_keys = k.shape[:2]
    if mask.shape == (n_keys,) and batch == 1:
        mask = mask[None]
    if mask.shape != (batch, n_keys):
        raise ValueError(f"key_mask must have shape [B, Tk] = {(batch, n_keys)}, got {mask.shape}")
    return mask


def _sequence_table(cu_seqlens: Any, q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Return int64 [N, 5]: batch index, query begin and end, key begin and end."""
    batch, n_queries, n_keys = q.shape[0], q.shape[1], k.shape[1]
    if cu_seqlens is None:
        return whole_sequences(batch, n_queries, n_keys)
    if isinstance(cu_seqlens, (list, tuple, range)):
        cu_seqlens = np.asarray(cu_seqlens, None if len(cu_seqlens) else np.int64)
    bounds = arrays.to_host(cu_seqlens, "cu_seqlens")
    if bounds.dtype.kind not in "iu":
        raise TypeError(f"cu_seqlens must be integers, got {bounds.dtype}")
    if bounds.ndim != 1 or len(bounds) < 1:
        raise ValueError(f"cu_seqlens must have shape [n_sequences + 1], got {bounds.shape}")
    if batch != 1:
        raise ValueError(
            "cu_seqlens packs all sequences along one token axis: B must be 1 or absent, got B = "
            f"{batch}"
        )
    if n_queries != n_keys:
        raise ValueError(
            f"cu_seqlens needs as many queries as keys, got Tq = {n_queries} and Tk = {n_keys}"
        )
    # unsigned bounds would wrap around in the differences below
    bounds = bounds.astype(np.int64)
    if bounds[0] != 0 or bounds[-1] != n_keys:
        raise ValueError(
            f"cu_seqlens must start at 0 and end at T = {n_keys}, got {bounds[0]} ... {bounds[-1]}"
        )
    steps = np.diff(bounds)
    if (steps < 0).any():
        where = int(np.argmax(steps < 0))
        raise ValueError(
            f"cu_seqlens must not decrease, got {bounds[where]}, {bounds[where + 1]} at index "
            f"{where}"
        )
    # empty sequences are legal, and stay in the table: they have states
    begin, end = bounds[:-1], bounds[1:]
    return np.stack([np.zeros_like(begin), begin, end, begin, end], axis=1)


def whole_sequences(batch: int, n_queries: int, n_keys: int) -> np.ndarray:
    """Return the table of sequences of a batch, int64 [B, 5]: each row is one whole sequence."""
    table = np.empty((batch, 5), np.int64)
    table[:] = (0, 0, n_queries, 0, n_keys)
    table[:, 0] = np.arange(batch)
    return table


def _check_chunk_size(chunk_size: int | None, memory_limit: int | str | None) -> None:
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, np.integer)):
        raise TypeError(f"chunk_size must be an integer number of tokens, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")
    if memory_limit is not None:
        raise ValueError(
            "chunk_size and memory_limit both bound the temporary memory; give one of them"
        )


def _limited(problem: Problem, memory_limit: int) -> Problem:
    """Lower the workspace to the limit."""
    # a limit above the workspace changes nothing: larger chunks are no faster
    smallest = chunking.smallest_workspace(problem)
    if memory_limit < smallest:
        raise ValueError(
            f"memory_limit is {memory_limit} bytes, but a segment of {chunking.SEGMENT} tokens "
            "needs more temporary memory "
            f"here; the smallest memory_limit that works is {smallest} (bytes)"
        )
    return replace(problem, workspace_bytes=min(problem.workspace_bytes, memory_limit))


def parse_bytes(size: int | str) -> int:
    """Turn 1_000_000, "512MB" (10^6), "1 GiB" (2^30) or "64M" into a number of bytes.

    Raises
    ------
    ValueError
        For any other text, and for sizes that are not positive.
    """
    if isinstance(size, (int, np.integer)) and not isinstance(size, bool):
        n_bytes = int(size)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", str(size).lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(
                "a memory size is a number of bytes or text such as '512MB' or '1GiB', got "
                f"{size!r}"
            )
        # clipped: a long row of digits is an infinite float
        n_bytes = int(min(float(match[1]) * _UNITS[match[2]], 2.0**62))
    if n_bytes < 1:
        raise ValueError(f"a memory size must be positive, got {size!r}")
    return n_bytes
