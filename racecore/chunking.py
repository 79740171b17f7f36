"""How a problem is cut: sequences into parts, parts into chunks, chunks into segments.

A *segment* is up to 1,024 tokens of one sequence. Segments start at fixed tokens, whatever the
limits are, and every sum over tokens adds whole segments in their order: that is why results keep
their bits for any chunk size, memory limit and number of threads. A *chunk* is a run of segments
whose temporary results fit the workspace. A *part* is a run of whole sequences that share one
chunk, or a single long sequence of several chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from racecore.problem import Problem

__all__ = [
    "BLOCK",
    "DEVICE_KEPT_BYTES",
    "KEPT_BYTES",
    "SEGMENT",
    "TOKENS",
    "are_whole",
    "can_keep_states",
    "chunks",
    "count_blocks",
    "has_state_per_segment",
    "parts",
    "segment_bytes",
    "smallest_workspace",
]

SEGMENT = 1024  # tokens; the unit of parallel work and of float64 summation
BLOCK = 32  # tokens that a kernel treats at once; a segment is a whole number of blocks
KEPT_BYTES = 32 << 20  # at most, of states that forward keeps for backward
DEVICE_KEPT_BYTES = 1 << 30  # likewise on a GPU, where a pass over the keys costs more than memory
# BLOCK where Numba should see any integer: a literal is a type of its own, compiled separately
TOKENS = np.int64(BLOCK)


def segment_bytes(problem: Problem) -> tuple[int, int]:
    """Return the workspace that the backward pass needs per segment and, on top, per block of its
    tokens.

    A segment needs the state before it, the gradient of the state after it, and partial sums of the
    gradients of planes and beta, for queries and for keys; a causal block needs numbers that its
    second pass reads again: per token two for every query head and bucket, and one for every state
    head and plane.
    """
    n_rows = problem.planes.shape[1] * problem.planes.shape[2]
    head_dim = problem.planes.shape[3]
    state = problem.n_state_heads * problem.n_buckets * (1 + problem.value_dim) * 8
    hash_parts = problem.n_state_heads * (n_rows * head_dim + 1) * 8
    numbers = 0
    if problem.is_causal:
        numbers = 2 * problem.n_heads * problem.n_buckets + problem.n_state_heads * n_rows
    return 2 * state + 2 * hash_parts, numbers * BLOCK * problem.dtype.itemsize


def smallest_workspace(problem: Problem) -> int:
    """Return the bytes that one segment takes: the least that any chunk needs."""
    per_segment, per_block = segment_bytes(problem)
    return per_segment + per_block * (SEGMENT // BLOCK)


def parts(problem: Problem) -> Iterator[tuple[int, int]]:
    """Yield (first, last) ranges of sequences that are treated together."""
    if len(problem.sequences) == 1:
        yield 0, 1
        return
    lengths = _lengths(problem)
    # reading a state takes no workspace
    per_segment, per_block = segment_bytes(problem) if problem.key is not None else (0, 0)
    costs = -(-lengths // SEGMENT) * per_segment + -(-lengths // BLOCK) * per_block
    first = bytes_used = tokens_used = 0
    for index, (cost, length) in enumerate(zip(costs.tolist(), lengths.tolist(), strict=True)):
        too_many = problem.chunk_tokens is not None and tokens_used + length > problem.chunk_tokens
        if index > first and (too_many or bytes_used + cost > problem.workspace_bytes):
            yield first, index
            first, bytes_used, tokens_used = index, 0, 0
        bytes_used += cost
        tokens_used += length
    if len(lengths) > first:
        yield first, len(lengths)


def chunks(part: Problem, side: str) -> list[np.ndarray]:
    """Return the segments of a part, chunk by chunk.

    Parameters
    ----------
    part : Problem
        Its sequences are those of one range that `parts` gave.
    side : {"query", "key"}
        Whose tokens to cut.

    Returns
    -------
    list of int64 arrays, shape [n, 5]
        At least one, even without tokens. Per segment: sequence (counted within the part), batch
        index, first token, token after the last, and the number of blocks of this chunk that come
        before it.
    """
    first = 1 if side == "query" else 3
    begin, end = part.sequences[:, first], part.sequences[:, first + 1]
    # one segment, as when decoding: saves 20 microseconds
    if len(begin) == 1 and 0 < end[0] - begin[0] <= SEGMENT:
        return [np.array([[0, part.sequences[0, 0], begin[0], end[0], 0]])]
    counts = -(-(end - begin) // SEGMENT)
    owner = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.empty((len(owner), 5), np.int64)
    table[:, 0] = owner
    table[:, 1] = part.sequences[owner, 0]
    table[:, 2] = begin[owner] + index * SEGMENT
    table[:, 3] = np.minimum(table[:, 2] + SEGMENT, end[owner])
    step = len(table) if len(counts) > 1 else _segments_per_chunk(part)
    starts = range(0, len(table), max(step, 1))
    result = [table[start : start + step] for start in starts] or [table]
    for chunk in result:
        n_blocks = -(-(chunk[:, 3] - chunk[:, 2]) // BLOCK)
        chunk[:, 4] = np.cumsum(n_blocks) - n_blocks
    return result


def are_whole(chunk: np.ndarray, n_sequences: int) -> bool:
    """Return whether every sequence of a part is one segment of the chunk, in order."""
    return len(chunk) == n_sequences and (
        n_sequences == 1 or bool((chunk[:, 0] == np.arange(n_sequences)).all())
    )


def has_state_per_segment(part: Problem, chunk: np.ndarray, n_states: int) -> bool:
    """Return whether a checkpoint of so many states has that before each segment of the chunk.

    It has if all were kept, or if every sequence is one segment.
    """
    return len(chunk) == n_states if len(part.sequences) == 1 else are_whole(chunk, n_states)


def can_keep_states(problem: Problem) -> bool:
    """Return whether to keep the states before all segments: else the backward pass sums the keys
    again.

    They may need a sixteenth of the memory of the inputs, but never more than `KEPT_BYTES` (more on
    a GPU): the memory of a call must not grow with the length.
    """
    head_dim, itemsize = problem.planes.shape[3], problem.dtype.itemsize
    # numbers of one token: queries and keys, and values
    inputs = (problem.n_heads + problem.n_kv_heads) * head_dim
    inputs += problem.n_kv_heads * problem.value_dim
    state = problem.n_state_heads * problem.n_buckets * (1 + problem.value_dim) * 8
    n_segments = int((-(-_lengths(problem) // SEGMENT)).sum())
    most = DEVICE_KEPT_BYTES if problem.on_device else KEPT_BYTES
    return state * 16 <= SEGMENT * inputs * itemsize and n_segments * state <= most


def count_blocks(chunk: np.ndarray) -> int:
    """Return the number of blocks of all segments of a chunk."""
    return int((-(-(chunk[:, 3] - chunk[:, 2]) // BLOCK)).sum())


def _segments_per_chunk(part: Problem) -> int:
    if part.chunk_tokens is not None:
        return -(-part.chunk_tokens // SEGMENT)
    return max(1, part.workspace_bytes // smallest_workspace(part))


def _lengths(problem: Problem) -> np.ndarray:
    """Return the tokens of every sequence, the larger number where queries and keys differ."""
    _, q_begin, q_end, k_begin, k_end = problem.sequences.T
    return np.maximum(q_end - q_begin, k_end - k_begin)
