"""CUDA launches of a problem: the argument structure, the scratch of a block, sums over segments.

A block takes one segment and head after another. It is one warp, or several if tensor cores compute
the products; `Tiling` has the sizes. Its scratch, for states and for the numbers of a group of
tokens, is shared memory, or global memory if a state is too large. `_scratch_numbers` counts the
pieces that the kernels take through `ops/cuda/call.cuh`; both must agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from racecore.problem import GradientBuffers, Problem
from racecore.runtime import cuda

__all__ = [
    "CudaCall",
    "LaunchScratch",
    "Tiling",
    "array_fields",
    "empty",
    "empty_hash_parts",
    "hash_width",
    "key_gradients",
    "launch",
    "make_call",
    "new_sums",
    "scan_segments",
    "stash_numbers",
    "state_heads_per_key",
    "tiling_of",
]

# buckets: with fewer, the products do not dominate the time
TENSOR_CORES_FROM = 16
# shared memory of a block without opting in
_DEFAULT_SHARED_BYTES = 48 << 10
# limit for a block of one warp: with more, too few blocks are resident on a multiprocessor
_SHARED_BYTES = 48 << 10
# limit for a block of several warps
_SHARED_BYTES_TENSOR_CORES = 112 << 10
_WORKSPACE_BYTES = 256 << 20
_MAX_BLOCKS = 1 << 20
_SCAN_THREADS = 128
_ARRAYS = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")


class Tiling(NamedTuple):
    """Sizes of groups and tiles: the constants of ops/cuda/warp.cuh."""

    tensor_cores: bool
    warps: int  # per block
    tokens: int  # per group
    columns: int  # per lane
    slab: int  # columns of a row are padded to a multiple of it
    row_step: int  # rows of a matrix are padded to a multiple of it
    pad: int  # extra numbers per row, and extra rows per token of coefficients

    def padded(self, n_rows: int) -> int:
        """Return the stride from token to token of coefficients for `n_rows` rows."""
        return _round_up(n_rows, self.row_step) + self.pad

    def matrix(self, n_rows: int, n_columns: int) -> tuple[int, int]:
        """Return the padded shape of a matrix in scratch."""
        return _round_up(n_rows, self.row_step), _round_up(n_columns, self.slab) + self.pad


def tiling_of(part: Problem) -> Tiling:
    """Return the tiling of a problem: one for all its kernels, which exchange padded arrays."""
    stored: Any = part.query if part.query is not None else part.key
    # gradients of shared keys are added up in float32 arrays, see `key_gradients`
    uses_tensor_cores = (
        stored.dtype.name == "bfloat16"
        and part.n_buckets >= TENSOR_CORES_FROM
        and state_heads_per_key(part) == 1
    )
    if uses_tensor_cores and cuda.has_bfloat16_products():
        return Tiling(True, warps=4, tokens=16, columns=4, slab=32, row_step=8, pad=4)
    longest = max(part.planes.shape[3], part.value_dim)
    columns = 1 if longest <= 32 else 2 if longest <= 64 else 4
    return Tiling(
        False, warps=1, tokens=8, columns=columns, slab=cuda.LANES * columns, row_step=4, pad=0
    )


class CudaCall(NamedTuple):
    """Arguments of every kernel.

    `record` holds addresses: the arrays in `kept` must outlive the launch.
    """

    record: np.ndarray
    kept: tuple[Any, ...]
    dtype: np.dtype  # storage
    real: np.dtype  # arithmetic
    tiling: Tiling
    n_segments: int
    n_tokens: int


class LaunchScratch(NamedTuple):
    """Pieces of scratch that a kernel takes, by kind."""

    states: int = 0
    state_sums: int = 0
    masses: int = 0  # [S]
    weights: int = 0  # [TOKENS, S]
    hash_sums: bool = False


def empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """Return an uninitialised array on the device."""
    return cuda.cupy().empty(shape, dtype)


def make_call(
    part: Problem,
    chunk: np.ndarray,
    *,
    out: Any = None,
    d_out: Any = None,
    d_query: Any = None,
    d_key: Any = None,
    d_value: Any = None,
    hash_width: int = 0,
) -> CudaCall:
    """Bundle the arguments for the segments of one chunk."""
    arrays = (part.query, part.key, part.value, out, d_out, d_query, d_key, d_value)
    stored = next(array for array in arrays if array is not None)
    tiling = tiling_of(part)
    fields: list[tuple[str, int]] = []
    for name, array in zip(_ARRAYS, arrays, strict=True):
        fields += array_fields(name, array, tiling.columns)
    segments, planes = _segments(chunk, tiling.tokens), _planes(part, tiling)
    beta = cuda.to_device(part.beta, part.dtype)
    mask: Any = None if part.key_mask is None else part.key_mask.view(np.uint8)
    fields += [
        ("segments", segments.data.ptr),
        ("planes", planes.data.ptr),
        ("planes_per_head", planes.shape[0] > 1),
        ("beta", beta.data.ptr),
        ("mask", 0 if mask is None else mask.data.ptr),
        ("mask_batch", 0 if mask is None else mask.strides[0]),
        ("mask_token", 0 if mask is None else mask.strides[1]),
        ("workspace", 0),
        ("scratch_numbers", 0),
        ("n_segments", len(chunk)),
        ("n_tables", part.planes.shape[1]),
        ("n_planes", part.planes.shape[2]),
        ("head_dim", part.planes.shape[3]),
        ("value_dim", part.value_dim),
        ("n_heads", part.n_heads),
        ("n_kv_heads", part.n_kv_heads),
        ("n_state_heads", part.n_state_heads),
        ("state_head", 0),
        ("bucket_mean", part.readout == "bucket_mean"),
        ("hash_width", hash_width),
    ]
    kept = (*arrays, segments, planes, beta, mask)
    n_tokens = int((chunk[:, 3] - chunk[:, 2]).sum())
    return CudaCall(
        cuda.structure(fields), kept, stored.dtype, part.dtype, tiling, len(chunk), n_tokens
    )


def _segments(chunk: np.ndarray, tokens: int) -> Any:
    """Return the segments of a chunk on the device, [n, 5].

    The last column counts the groups of tokens before a segment, not the CPU's blocks.
    """
    table = chunk.copy()
    n_groups = -(-(table[:, 3] - table[:, 2]) // tokens)
    table[:, 4] = np.cumsum(n_groups) - n_groups
    return cuda.to_device(table)


def _planes(part: Problem, tiling: Tiling) -> Any:
    """Return planes [M or 1, L*P, D], padded with zeros to whole tiles and slabs."""
    planes = part.planes[:1] if part.planes.strides[0] == 0 else part.planes
    heads, n_tables, n_planes, head_dim = planes.shape
    padded = np.zeros((heads, *tiling.matrix(n_tables * n_planes, head_dim)), part.dtype)
    padded[:, : n_tables * n_planes, :head_dim] = planes.reshape(heads, -1, head_dim)
    return cuda.to_device(padded)


def _is_vectorized(array: Any, columns: int) -> bool:
    """Return whether one load can read the columns of a lane: contiguous and aligned."""
    if (
        array is None
        or array.shape[-1] % columns
        or (array.shape[-1] > 1 and array.strides[-1] != array.itemsize)
    ):
        return False
    size = min(columns * array.itemsize, 16)
    return array.data.ptr % size == 0 and all(stride % size == 0 for stride in array.strides[:-1])


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def array_fields(name: str, array: Any, columns: int) -> list[tuple[str, int]]:
    """Return the fields of an `Array` of ops/cuda/warp.cuh; None becomes a null pointer."""
    labels = ("data", "batch", "token", "head", "dim")
    fields = [
        (f"{name}.{label}", x) for label, x in zip(labels, cuda.addresses(array), strict=True)
    ]
    return [*fields, (f"{name}.is_vectorized", _is_vectorized(array, columns))]


def launch(
    file: str,
    name: str,
    call: CudaCall,
    n_heads: int,
    scratch: LaunchScratch,
    *arguments: Any,
    state_head: int = 0,
) -> int:
    """Run a kernel over all segments of a call and `n_heads` heads; return the number of tokens."""
    n_tasks = call.n_segments * n_heads
    if n_tasks == 0:
        return 0
    record = call.record.copy()
    tiling = call.tiling
    numbers = _scratch_numbers(call, scratch)
    n_bytes = numbers * call.real.itemsize
    limit = _SHARED_BYTES
    if tiling.tensor_cores:
        limit = min(_SHARED_BYTES_TENSOR_CORES, cuda.most_shared_bytes())
    blocks = min(n_tasks, _MAX_BLOCKS)
    shared = n_bytes
    workspace = None
    if n_bytes > limit:
        blocks = min(blocks, max(1, _WORKSPACE_BYTES // n_bytes))
        shared = 0
        workspace = empty((blocks * numbers,), call.real)
        record["workspace"] = workspace.data.ptr
    record["scratch_numbers"], record["state_head"] = numbers, state_head
    function = cuda.kernel(file, name, call.dtype, tiling.columns, tiling.tensor_cores)
    if shared > _DEFAULT_SHARED_BYTES:
        function.max_dynamic_shared_size_bytes = shared
    function((blocks,), (tiling.warps * cuda.LANES,), (record, *arguments), shared_mem=shared)
    return call.n_tokens


def _scratch_numbers(call: CudaCall, scratch: LaunchScratch) -> int:
    """Return the scratch of a block, in numbers of the arithmetic's dtype."""
    size = {
        name: int(call.record[name][0])
        for name in ("n_tables", "n_planes", "head_dim", "value_dim", "hash_width")
    }
    tiling, doubles = call.tiling, 8 // call.real.itemsize
    n_buckets, n_rows = size["n_tables"] << size["n_planes"], size["n_tables"] * size["n_planes"]
    buckets, rows = tiling.padded(n_buckets), tiling.padded(n_rows)
    values = math.prod(tiling.matrix(n_buckets, size["value_dim"]))
    numbers = scratch.states * (values + buckets * doubles)
    numbers += scratch.state_sums * (values + buckets) + scratch.masses * buckets
    # u, up and down of the hash
    numbers += 3 * tiling.tokens * rows
    numbers += scratch.weights * tiling.tokens * buckets
    if scratch.hash_sums and tiling.warps > 1:
        numbers += tiling.warps * doubles
    if scratch.hash_sums and size["hash_width"] > 1:
        numbers += math.prod(tiling.matrix(n_rows, size["head_dim"]))
    return numbers


def stash_numbers(part: Problem, chunk: np.ndarray) -> int:
    """Return the size of the stash from `causal_scan_queries_backward` for the scan over keys."""
    tiling, (n_tables, n_planes) = tiling_of(part), part.planes.shape[1:3]
    n_groups = int((-(-(chunk[:, 3] - chunk[:, 2]) // tiling.tokens)).sum())
    per_token = part.n_state_heads * tiling.padded(
        n_tables * n_planes
    ) + 2 * part.n_heads * tiling.padded(part.n_buckets)
    return n_groups * tiling.tokens * per_token


def state_heads_per_key(part: Problem) -> int:
    """Return the state heads per key/value head: kernels over keys run once for each."""
    return part.n_state_heads // part.n_kv_heads


@contextmanager
def key_gradients(
    part: Problem, grads: GradientBuffers, d_out: Any
) -> Iterator[tuple[Problem, GradientBuffers, Any]]:
    """Yield the problem, the gradients and d_out in a dtype that can add up state heads.

    If planes or beta are per query head and queries are grouped, several state heads add to one row
    of `grads.key` and `grads.value`. In 16 bits every addition would be rounded, so the sums are
    formed in copies in the dtype of the arithmetic.
    """
    if state_heads_per_key(part) == 1 or part.key is None or part.key.dtype == part.dtype:
        yield part, grads, d_out
        return
    promoted = replace(
        part,
        **{name: _converted(getattr(part, name), part.dtype) for name in ("query", "key", "value")},
    )
    targets = {
        name: getattr(grads, name) for name in ("key", "value") if getattr(grads, name) is not None
    }
    sums = {name: empty(target.shape, part.dtype) for name, target in targets.items()}
    for name, target in targets.items():
        # keep the rows of other parts and chunks
        sums[name][...] = target
    yield promoted, replace(grads, query=None, **sums), _converted(d_out, part.dtype)
    for name, target in targets.items():
        target[...] = sums[name].astype(target.dtype)


def _converted(array: Any, dtype: np.dtype) -> Any:
    return None if array is None else array.astype(dtype)


def new_sums(part: Problem, n_segments: int, n_heads: int) -> Any:
    """Return an array for the sums of each segment: float64 [n, heads, S*(1+V)]."""
    return empty((n_segments, n_heads, part.n_buckets * (1 + part.value_dim)), np.float64)


def hash_width(total: Any) -> int:
    """Return the width of a row of gradients of planes and beta, 0 if they are not wanted."""
    return 0 if total is None else int(total.shape[2])


def empty_hash_parts(chunk: np.ndarray, n_heads: int, total: Any) -> Any:
    """Return an array for each task's part of `total`, gradients of planes and beta.

    Shape [n, heads, width], float64.
    """
    return empty((len(chunk), n_heads, hash_width(total)), np.float64)


def scan_segments(sequences: np.ndarray, parts: Any, carry: Any, *, reverse: bool = False) -> None:
    """Replace parts by their exclusive prefix sums, in order, and advance the carry.

    Parameters
    ----------
    sequences : int64 [n]
        The row of `carry` of each part.
    parts : float64 [n, heads * repeats, width]
        `repeats` adjacent parts are added up; the sum before them goes to the first of them.
    carry : float64 [n_sequences, heads, width]
        The sums so far.
    reverse : bool
        From the last part to the first.
    """
    if parts.size == 0:
        return
    heads, width = carry.shape[1:]
    table = cuda.to_device(np.ascontiguousarray(sequences))
    n_blocks = -(-heads * width // _SCAN_THREADS)
    function = cuda.kernel("cuda/sums.cu", "scan_segments", np.dtype(np.float64), 1)
    sizes = (len(sequences), heads, parts.shape[1] // heads, width, int(reverse))
    function((n_blocks,), (_SCAN_THREADS,), (table, parts, carry, *map(np.int64, sizes)))
