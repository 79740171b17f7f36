"""How a long run is cut: sequences into units, units into passes, passes into chunks of tokens; and
the memory that takes.

A *unit* is one long sequence, or a group of short ones that fit a chunk together. Every pass goes
over the chunks of a unit in order (the causal backward pass in reverse order):

    bidirectional   sum       key, value                 ->
                    read out  query (d_out)              -> out (d_query)
                    sum back  key, value                 -> d_key, d_value
    causal          scan      query, key, value          -> out
                    scan back query, key, value, d_out   -> d_query, d_key, d_value

Between chunks only states are kept. Chunks of a sequence are whole segments from its start on, and
all sums over tokens add whole segments in their order, so results have the bits of
`racecore.attention` for any size of chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from racecore import chunking
from racecore.problem import Problem

__all__ = ["PASSES", "ChunkTask", "MemoryBudget", "Pass", "budget_memory", "n_passes", "tasks"]

# Workspace of one chunk in bytes, at most, for chunks of 16 segments.
_MAX_WORKSPACE = 64 << 20
# The states of a unit may take 1/4 of the memory of the buffers.
_BUFFERS_PER_STATES = 4


@dataclass(frozen=True)
class Pass:
    """The arrays that one pass reads and writes."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    # How often its kernels go over the tokens, for progress reports.
    times: int = 1
    is_backward: bool = False

    @property
    def is_reversed(self) -> bool:
        """Whether it processes the chunks in reverse order: the causal backward pass."""
        return self.is_backward and "query" in self.reads


def _pass(reads: str, writes: str, times: int = 1, is_backward: bool = False) -> Pass:
    return Pass(tuple(reads.split()), tuple(writes.split()), times, is_backward)


# By (is_causal, with_gradients): the passes by name, in their order.
PASSES = {
    (False, False): {"sum": _pass("key value", ""), "read out": _pass("query", "out")},
    (False, True): {
        "sum": _pass("key value", ""),
        "read out": _pass("query d_out", "out d_query", times=2),
        "sum back": _pass("key value", "d_key d_value", is_backward=True),
    },
    (True, False): {"scan": _pass("query key value", "out")},
    (True, True): {
        "scan": _pass("query key value", "out"),
        "scan back": _pass(
            "query key value d_out", "d_query d_key d_value", times=2, is_backward=True
        ),
    },
}
# Arrays with one row a key; all others have one a query.
_OF_KEYS = ("key", "value", "key_mask", "d_key", "d_value")


@dataclass(frozen=True, eq=False)
class ChunkTask:
    """One chunk of one pass.

    Attributes
    ----------
    number : int
        Among all tasks of the run.
    first : int
        Number of the first task of its unit.
    pass_name : str
    chunk : int
        Number of the chunk in its unit.
    n_chunks : int
        Chunks of the unit; 0 where the unit is a group of short sequences.
    is_last : bool
        Of its unit.
    sequences : int array, shape [N, 5]
        0, begin and end of queries, begin and end of keys, relative to the two ranges below.
    queries, keys : (begin, end)
        Ranges of flattened tokens.
    """

    number: int
    first: int
    pass_name: str
    chunk: int
    n_chunks: int
    is_last: bool
    sequences: np.ndarray
    queries: tuple[int, int]
    keys: tuple[int, int]

    def tokens(self, name: str) -> tuple[int, int]:
        """Return the range of tokens of an array that this task reads or writes."""
        return self.keys if name in _OF_KEYS else self.queries

    @property
    def is_of_one_sequence(self) -> bool:
        """Whether the unit is one sequence of several chunks, between which states are carried."""
        return self.n_chunks > 0


@dataclass(frozen=True)
class MemoryBudget:
    """Sizes that keep a run within its memory limit.

    Attributes
    ----------
    chunk_tokens : int
        Tokens of a chunk at most, whole segments.
    workspace_bytes : int
        Temporary memory of one chunk.
    unit_sequences : int
        Short sequences of one unit at most.
    peak_bytes : int
        Memory that the run takes.
    """

    chunk_tokens: int
    workspace_bytes: int
    unit_sequences: int
    peak_bytes: int


def budget_memory(
    problem: Problem, with_gradients: bool, memory_limit: int, max_segments: int = 16
) -> MemoryBudget:
    """Return the longest chunks that a memory limit allows, and the memory they take.

    A run takes two buffers of a chunk for the arrays read and two for the arrays written, of the
    widest passes (one is read or written while the other is used for computing), the workspace of
    one chunk, and a state and its gradient for every sequence of a unit::

        2 * chunk_tokens * row_bytes + workspace_bytes + 2 * unit_sequences * state_bytes

    Parameters
    ----------
    problem : Problem
    with_gradients : bool
    memory_limit : int
        In bytes.
    max_segments : int
        Segments of a chunk at most: longer chunks are no faster.

    Raises
    ------
    ValueError
        The limit is too small; names the smallest that works.
    """
    passes = PASSES[problem.is_causal, with_gradients].values()
    row_bytes = max(sum(_row_bytes(problem, name) for name in p.reads) for p in passes)
    row_bytes += max(sum(_row_bytes(problem, name) for name in p.writes) for p in passes)
    state = problem.n_state_heads * problem.n_buckets * (1 + problem.value_dim) * 8
    segment_workspace = chunking.smallest_workspace(problem)
    segment_buffers = 2 * chunking.SEGMENT * row_bytes
    smallest = segment_buffers + segment_workspace + 2 * state
    if memory_limit < smallest:
        raise ValueError(
            f"memory_limit is {memory_limit:,} bytes; the smallest that works here is "
            f"{smallest:,} (buffers for "
            f"{chunking.SEGMENT:,} tokens twice, and the workspace of one segment)"
        )
    # Every unit needs at least one state and its gradient. What remains goes to segments first,
    # then to the workspace, then to further short sequences per unit.
    available = memory_limit - 2 * state
    n_segments = min(max_segments, available // (segment_buffers + segment_workspace))
    workspace = min(
        _MAX_WORKSPACE * max_segments // 16,
        available - n_segments * segment_buffers,
    )
    n_segments = min(n_segments, workspace // segment_workspace) or 1
    workspace = max(workspace, segment_workspace)
    buffers = n_segments * segment_buffers
    states = min(memory_limit - buffers - workspace, buffers // _BUFFERS_PER_STATES)
    sequences = max(1, min(states // (2 * state), len(problem.sequences)))
    peak = buffers + workspace + 2 * sequences * state
    return MemoryBudget(n_segments * chunking.SEGMENT, workspace, sequences, peak)


def _row_bytes(problem: Problem, name: str) -> int:
    """Return the bytes of one token of an array, all heads."""
    key, query = problem.key, problem.query
    if key is None or query is None:
        raise TypeError("a run needs queries and keys")
    heads = problem.n_kv_heads if name in _OF_KEYS else problem.n_heads
    has_value_dim = name in ("value", "d_value", "out", "d_out")
    dim = problem.value_dim if has_value_dim else query.shape[3]
    return heads * dim * query.dtype.itemsize


def n_passes(is_causal: bool, with_gradients: bool) -> int:
    """Return how often the kernels go over every token."""
    return sum(p.times for p in PASSES[is_causal, with_gradients].values())


def tasks(problem: Problem, with_gradients: bool, budget: MemoryBudget) -> Iterator[ChunkTask]:
    """Yield all tasks of a run in their order."""
    query, key = problem.query, problem.key
    if query is None or key is None:
        raise TypeError("a run needs queries and keys")
    # [N, 5]: batch row, begin and end of queries and of keys, now counted along the flattened axes.
    flat = problem.sequences.copy()
    flat[:, 1:3] += flat[:, :1] * query.shape[1]
    flat[:, 3:5] += flat[:, :1] * key.shape[1]
    flat[:, 0] = 0
    passes = PASSES[problem.is_causal, with_gradients]
    number = 0
    for first, last in _units(flat, budget):
        chunks = [
            (name, chunk)
            for name, p in passes.items()
            for chunk in _chunks(flat[first:last], p, budget)
        ]
        begin = number
        for name, (chunk, total, sequences) in chunks:
            q, k = sequences[:, 1:3], sequences[:, 3:5]
            queries = (int(q[0, 0]), int(q[-1, 1]))
            keys = (int(k[0, 0]), int(k[-1, 1]))
            local = sequences - np.array([0, queries[0], queries[0], keys[0], keys[0]])
            is_last = number - begin == len(chunks) - 1
            yield ChunkTask(number, begin, name, chunk, total, is_last, local, queries, keys)
            number += 1


def _units(flat: np.ndarray, budget: MemoryBudget) -> Iterator[tuple[int, int]]:
    """Yield (first, last) ranges of sequences."""
    ends = flat[:, [2, 4]]
    first = 0
    while first < len(flat):
        begin = flat[first, [1, 3]]
        lengths = ends[first : first + budget.unit_sequences] - begin
        fits = (lengths <= budget.chunk_tokens).all(axis=1)
        # Ends do not decrease, so those that fit come first. A long sequence is a unit by itself.
        last = first + max(1, int(fits.sum()))
        yield first, last
        first = last


def _chunks(
    sequences: np.ndarray, p: Pass, budget: MemoryBudget
) -> list[tuple[int, int, np.ndarray]]:
    """Return (number, how many, sequences [N, 5]) of every chunk of a unit in a pass."""
    _, q_begin, q_end, k_begin, k_end = sequences[0].tolist()
    longest = max(q_end - q_begin, k_end - k_begin)
    if len(sequences) > 1 or longest <= budget.chunk_tokens:
        return [(0, 0, sequences)]
    n_tokens = k_end - k_begin if "key" in p.reads else q_end - q_begin
    total = max(1, math.ceil(n_tokens / budget.chunk_tokens))
    chunks = []
    for number in range(total):
        begin = number * budget.chunk_tokens
        end = min(n_tokens, begin + budget.chunk_tokens)
        # A pass over keys alone has no queries in its chunks, and the other way round.
        queries = (q_begin + begin, q_begin + end) if "query" in p.reads else (q_begin, q_begin)
        keys = (k_begin + begin, k_begin + end) if "key" in p.reads else (k_begin, k_begin)
        chunks.append((number, total, np.array([[0, *queries, *keys]])))
    return chunks[::-1] if p.is_reversed else chunks
