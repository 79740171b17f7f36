"""How a long run is cut: sequences into units, units into passes, passes into chunks of tokens, and
what that takes.

A *unit* is one long sequence, or a run of short ones that fit a chunk together. Every pass goes
over the chunks of a unit in order (the causal backward pass in reverse):

    bidirectional   sum       key, value           ->
                    read      query (d_out)        -> out (d_query)
                    sum back  key, value           -> d_key, d_value
    causal          walk      query, key, value    -> out
                    walk back query, key, value, d_out -> d_query, d_key, d_value

Between chunks only states are kept. Chunks of a sequence are whole segments from its start on, and
all sums over tokens add whole segments in their order, so results have the bits of
`racecore.attention` whatever the chunks are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from racecore import chunking
from racecore.problem import Problem

__all__ = ["PASSES", "Limits", "Pass", "Task", "limits", "n_passes", "tasks"]

_WORKSPACE = 64 << 20  # bytes of temporary memory of one chunk, at most
_STATES_SHARE = 4  # states of a unit may take 1/4 of what the buffers take


@dataclass(frozen=True)
class Pass:
    """What one pass reads and writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    times: int = 1  # that its kernels go over the tokens, as they tell of their progress
    backward: bool = False

    @property
    def is_walk_back(self) -> bool:
        """Whether it goes over the chunks in reverse."""
        return self.backward and "query" in self.reads


def _pass(reads: str, writes: str, times: int = 1, backward: bool = False) -> Pass:
    return Pass(tuple(reads.split()), tuple(writes.split()), times, backward)


PASSES = {  # by (causal, with gradients)
    (False, False): {"sum": _pass("key value", ""), "read": _pass("query", "out")},
    (False, True): {
        "sum": _pass("key value", ""),
        "read": _pass("query d_out", "out d_query", times=2),
        "sum back": _pass("key value", "d_key d_value", backward=True),
    },
    (True, False): {"causal_scan": _pass("query key value", "out")},
    (True, True): {
        "causal_scan": _pass("query key value", "out"),
        "walk back": _pass(
            "query key value d_out", "d_query d_key d_value", times=2, backward=True
        ),
    },
}
_OF_KEYS = ("key", "value", "key_mask", "d_key", "d_value")


@dataclass(frozen=True, eq=False)
class Task:
    """One chunk of one pass."""

    number: int  # of all tasks of the run
    first: int  # the number of its unit's first task
    stage: str
    chunk: int  # of its unit
    n_chunks: int  # of the unit; 0 where the unit is a run of short sequences
    is_last: bool  # of its unit
    sequences: (
        np.ndarray
    )  # [N, 5]: 0, then begin and end of queries and of keys, counted from those below
    queries: tuple[int, int]  # flattened tokens
    keys: tuple[int, int]

    def tokens(self, name: str) -> tuple[int, int]:
        """Return which tokens of an array this task reads or writes."""
        return self.keys if name in _OF_KEYS else self.queries

    @property
    def is_of_one_sequence(self) -> bool:
        """Whether the unit is one sequence of several chunks, between which states are carried."""
        return self.n_chunks > 0


@dataclass(frozen=True)
class Limits:
    """What a memory limit allows."""

    chunk_tokens: int
    workspace_bytes: int
    unit_sequences: int  # short sequences that share a unit, at most
    peak_bytes: int  # of memory that a run takes


def limits(
    problem: Problem, with_gradients: bool, memory_limit: int, most_segments: int = 16
) -> Limits:
    """Return the longest chunks that a memory limit allows, of at most so many segments: longer
    ones are no faster.

    A run takes two buffers of a chunk for what a pass reads and for what a pass writes, of the
    widest passes (one is read or written while the other is computed on), the workspace of one
    chunk, and state and gradient of the state for every sequence of a unit::

        2 * chunk_tokens * row_bytes + workspace_bytes + 2 * unit_sequences * state_bytes

    Raises
    ------
    ValueError
        The limit is too small; names the smallest that works.
    """
    passes = PASSES[problem.is_causal, with_gradients].values()
    row_bytes = max(sum(_row_bytes(problem, name) for name in p.reads) for p in passes)
    row_bytes += max(sum(_row_bytes(problem, name) for name in p.writes) for p in passes)
    state = problem.n_state_heads * problem.n_buckets * (1 + problem.value_dim) * 8
    per_segment = chunking.smallest_workspace(problem)
    smallest = 2 * chunking.SEGMENT * row_bytes + per_segment + 2 * state
    if memory_limit < smallest:
        raise ValueError(
            f"memory_limit is {memory_limit:,} bytes; the smallest that works here is "
            f"{smallest:,} (buffers for "
            f"{chunking.SEGMENT:,} tokens twice, and the workspace of one segment)"
        )
    spare = memory_limit - 2 * state
    n_segments = min(most_segments, spare // (2 * chunking.SEGMENT * row_bytes + per_segment))
    workspace = min(
        _WORKSPACE * most_segments // 16, spare - 2 * n_segments * chunking.SEGMENT * row_bytes
    )
    n_segments = min(n_segments, workspace // per_segment) or 1
    workspace = max(workspace, per_segment)
    buffers = 2 * n_segments * chunking.SEGMENT * row_bytes
    room = min(memory_limit - buffers - workspace, buffers // _STATES_SHARE)
    sequences = max(1, min(room // (2 * state), len(problem.sequences)))
    peak = buffers + workspace + 2 * sequences * state
    return Limits(n_segments * chunking.SEGMENT, workspace, sequences, peak)


def _row_bytes(problem: Problem, name: str) -> int:
    """Return the bytes of one token of an array, all heads."""
    key, query = problem.key, problem.query
    if key is None or query is None:
        raise TypeError("a run needs queries and keys")
    of_values = name in ("value", "d_value", "out", "d_out")
    heads = problem.n_kv_heads if name in _OF_KEYS else problem.n_heads
    return heads * (problem.value_dim if of_values else query.shape[3]) * query.dtype.itemsize


def n_passes(is_causal: bool, with_gradients: bool) -> int:
    """Return how often the kernels go over every token."""
    return sum(p.times for p in PASSES[is_causal, with_gradients].values())


def tasks(problem: Problem, with_gradients: bool, limit: Limits) -> Iterator[Task]:
    """Yield all tasks of a run in their order."""
    query, key = problem.query, problem.key
    if query is None or key is None:
        raise TypeError("a run needs queries and keys")
    flat = problem.sequences.copy()  # tokens counted along the flattened axes
    flat[:, 1:3] += flat[:, :1] * query.shape[1]
    flat[:, 3:5] += flat[:, :1] * key.shape[1]
    flat[:, 0] = 0
    stages = PASSES[problem.is_causal, with_gradients]
    number = 0
    for first, last in _units(flat, limit):
        found = [
            (stage, chunk)
            for stage, p in stages.items()
            for chunk in _chunks(flat[first:last], stage, p, limit)
        ]
        begin = number
        for stage, (chunk, total, sequences) in found:
            q, k = sequences[:, 1:3], sequences[:, 3:5]
            queries, keys = (int(q[0, 0]), int(q[-1, 1])), (int(k[0, 0]), int(k[-1, 1]))
            local = sequences - np.array([0, queries[0], queries[0], keys[0], keys[0]])
            is_last = number - begin == len(found) - 1
            yield Task(number, begin, stage, chunk, total, is_last, local, queries, keys)
            number += 1


def _units(flat: np.ndarray, limit: Limits) -> Iterator[tuple[int, int]]:
    """Yield (first, last) ranges of sequences."""
    ends = flat[:, [2, 4]]
    first = 0
    while first < len(flat):
        begin = flat[first, [1, 3]]
        within = (ends[first : first + limit.unit_sequences] - begin <= limit.chunk_tokens).all(
            axis=1
        )
        last = first + max(1, int(within.sum()))  # ends do not decrease
        yield first, last
        first = last


def _chunks(
    sequences: np.ndarray, stage: str, p: Pass, limit: Limits
) -> list[tuple[int, int, np.ndarray]]:
    """Return (number, how many, sequences [N, 5]) of every chunk that a pass cuts a unit into."""
    _, q_begin, q_end, k_begin, k_end = sequences[0].tolist()
    longest = max(q_end - q_begin, k_end - k_begin)
    if len(sequences) > 1 or longest <= limit.chunk_tokens:
        return [(0, 0, sequences)]
    n_tokens = k_end - k_begin if "key" in p.reads else q_end - q_begin
    total = max(1, math.ceil(n_tokens / limit.chunk_tokens))
    cuts = []
    for number in range(total):
        begin = number * limit.chunk_tokens
        end = min(n_tokens, begin + limit.chunk_tokens)
        queries = (q_begin + begin, q_begin + end) if "query" in p.reads else (q_begin, q_begin)
        keys = (k_begin + begin, k_begin + end) if "key" in p.reads else (k_begin, k_begin)
        cuts.append((number, total, np.array([[0, *queries, *keys]])))
    return cuts[::-1] if p.is_walk_back else cuts
