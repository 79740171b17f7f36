"""From a problem to CUDA launches: arguments in one structure, scratch of the right size, sums over
segments.

A block takes one segment and head after another. It is one warp, or several where tensor cores do
the products, in blocks of tokens and columns of another size: `Tiling` says which. It needs scratch
for states and for the numbers of a group of tokens: shared memory, or global memory where a state
is too large for that. The pieces are counted here and handed out in `ops/cuda/call.cuh`; both lists
must agree.
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
    "Call",
    "Scratch",
    "Tiling",
    "array_fields",
    "empty",
    "empty_hash_parts",
    "hash_width",
    "key_gradients",
    "launch",
    "make_call",
    "new_sums",
    "scan",
    "shares",
    "stash_numbers",
    "tiling_of",
]

TENSOR_CORES_FROM = 16  # buckets: with fewer, products are not what takes the time
_ASKING_BYTES = 48 << 10  # shared memory that a block can have without asking
_SHARED_BYTES = 48 << 10  # of a block of one warp: more would leave an SM too few of them
_SHARED_BYTES_OF_WARPS = 112 << 10  # of one of several warps
_WORKSPACE_BYTES = 256 << 20
_MAX_BLOCKS = 1 << 20
_SCAN_THREADS = 128
_ARRAYS = ("query", "key", "value", "out", "d_out", "d_query", "d_key", "d_value")


class Tiling(NamedTuple):
    """How kernels cut their work up: constants of ops/cuda/warp.cuh."""

    tensor_cores: bool
    warps: int  # of a block
    tokens: int  # of a group
    columns: int  # of a lane
    slab: int  # columns of a row are padded to a multiple of it
    row_step: int  # likewise rows of a matrix
    pad: int  # numbers between rows, and rows between coefficients

    def wide(self, n_rows: int) -> int:
        """Return how far the coefficients of a matrix are apart from token to token."""
        return _up(n_rows, self.row_step) + self.pad

    def matrix(self, n_rows: int, n_columns: int) -> tuple[int, int]:
        """Return the shape of a matrix in scratch."""
        return _up(n_rows, self.row_step), _up(n_columns, self.slab) + self.pad


def tiling_of(part: Problem) -> Tiling:
    """Return how the kernels of a problem cut it: all of them alike, as they leave numbers for each
    other.
    """
    stored: Any = part.query if part.query is not None else part.key
    # shared keys add up their gradients in float32, so these arrays have another dtype: see
    # `key_gradients`
    suits = (
        stored.dtype.name == "bfloat16"
        and part.n_buckets >= TENSOR_CORES_FROM
        and shares(part) == 1
    )
    if suits and cuda.has_bfloat16_products():
        return Tiling(True, warps=4, tokens=16, columns=4, slab=32, row_step=8, pad=4)
    longest = max(part.planes.shape[3], part.value_dim)
    columns = 1 if longest <= 32 else 2 if longest <= 64 else 4
    return Tiling(
        False, warps=1, tokens=8, columns=columns, slab=cuda.LANES * columns, row_step=4, pad=0
    )


class Call(NamedTuple):
    """What every kernel needs. `record` holds addresses: the arrays in `kept` must outlive the
    launch.
    """

    record: np.ndarray
    kept: tuple[Any, ...]
    dtype: np.dtype  # of the arrays
    real: np.dtype  # of the arithmetic
    tiling: Tiling
    n_segments: int
    n_tokens: int


class Scratch(NamedTuple):
    """How often a kernel takes each kind of scratch."""

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
) -> Call:
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
        ("share", 0),
        ("bucket_mean", part.readout == "bucket_mean"),
        ("hash_width", hash_width),
    ]
    kept = (*arrays, segments, planes, beta, mask)
    n_tokens = int((chunk[:, 3] - chunk[:, 2]).sum())
    return Call(
        cuda.structure(fields), kept, stored.dtype, part.dtype, tiling, len(chunk), n_tokens
    )


def _segments(chunk: np.ndarray, tokens: int) -> Any:
    """Return a chunk's table on the device, its last column counting groups of tokens in place of
    blocks.
    """
    table = chunk.copy()
    n_groups = -(-(table[:, 3] - table[:, 2]) // tokens)
    table[:, 4] = np.cumsum(n_groups) - n_groups
    return cuda.to_device(table)


def _planes(part: Problem, tiling: Tiling) -> Any:
    """Return planes [M or 1, L*P, D], rows padded with zeros to whole tiles and slabs."""
    planes = part.planes[:1] if part.planes.strides[0] == 0 else part.planes
    heads, n_tables, n_planes, head_dim = planes.shape
    wide = np.zeros((heads, *tiling.matrix(n_tables * n_planes, head_dim)), part.dtype)
    wide[:, : n_tables * n_planes, :head_dim] = planes.reshape(heads, -1, head_dim)
    return cuda.to_device(wide)


def _is_wide(array: Any, columns: int) -> bool:
    """Tell whether a lane can read its columns at once: neighbours in memory, at a multiple of
    their size.
    """
    if (
        array is None
        or array.shape[-1] % columns
        or (array.shape[-1] > 1 and array.strides[-1] != array.itemsize)
    ):
        return False
    size = min(columns * array.itemsize, 16)
    return array.data.ptr % size == 0 and all(stride % size == 0 for stride in array.strides[:-1])


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def array_fields(name: str, array: Any, columns: int) -> list[tuple[str, int]]:
    """Return the fields of an `Array` of ops/cuda/warp.cuh; None is a null pointer."""
    labels = ("data", "batch", "token", "head", "dim")
    fields = [
        (f"{name}.{label}", x) for label, x in zip(labels, cuda.addresses(array), strict=True)
    ]
    return [*fields, (f"{name}.is_wide", _is_wide(array, columns))]


def launch(
    file: str,
    name: str,
    call: Call,
    n_heads: int,
    scratch: Scratch,
    *arguments: Any,
    share: int = 0,
) -> int:
    """Run a kernel over all segments of a call and `n_heads` heads. Return the number of tokens."""
    n_tasks = call.n_segments * n_heads
    if n_tasks == 0:
        return 0
    record, numbers, tiling = call.record.copy(), _scratch_numbers(call, scratch), call.tiling
    n_bytes, most = numbers * call.real.itemsize, _SHARED_BYTES
    if tiling.tensor_cores:
        most = min(_SHARED_BYTES_OF_WARPS, cuda.most_shared_bytes())
    blocks, workspace, shared = min(n_tasks, _MAX_BLOCKS), None, n_bytes
    if n_bytes > most:
        blocks, shared = min(blocks, max(1, _WORKSPACE_BYTES // n_bytes)), 0
        workspace = empty((blocks * numbers,), call.real)
        record["workspace"] = workspace.data.ptr
    record["scratch_numbers"], record["share"] = numbers, share
    function = cuda.kernel(file, name, call.dtype, tiling.columns, tiling.tensor_cores)
    if shared > _ASKING_BYTES:
        function.max_dynamic_shared_size_bytes = shared
    function((blocks,), (tiling.warps * cuda.LANES,), (record, *arguments), shared_mem=shared)
    return call.n_tokens


def _scratch_numbers(call: Call, scratch: Scratch) -> int:
    """Count what a block takes, in numbers of the arithmetic's dtype."""
    size = {
        name: int(call.record[name][0])
        for name in ("n_tables", "n_planes", "head_dim", "value_dim", "hash_width")
    }
    tiling, doubles = call.tiling, 8 // call.real.itemsize
    n_buckets, n_rows = size["n_tables"] << size["n_planes"], size["n_tables"] * size["n_planes"]
    buckets, rows = tiling.wide(n_buckets), tiling.wide(n_rows)
    values = math.prod(tiling.matrix(n_buckets, size["value_dim"]))
    numbers = scratch.states * (values + buckets * doubles)
    numbers += scratch.state_sums * (values + buckets) + scratch.masses * buckets
    numbers += 3 * tiling.tokens * rows + scratch.weights * tiling.tokens * buckets  # u, up, down
    if scratch.hash_sums and tiling.warps > 1:
        numbers += tiling.warps * doubles
    if scratch.hash_sums and size["hash_width"] > 1:
        numbers += math.prod(tiling.matrix(n_rows, size["head_dim"]))
    return numbers


def stash_numbers(part: Problem, chunk: np.ndarray) -> int:
    """Count what `walk_queries_backward` leaves for `walk_keys_backward`."""
    tiling, (n_tables, n_planes) = tiling_of(part), part.planes.shape[1:3]
    n_groups = int((-(-(chunk[:, 3] - chunk[:, 2]) // tiling.tokens)).sum())
    per_token = part.n_state_heads * tiling.wide(
        n_tables * n_planes
    ) + 2 * part.n_heads * tiling.wide(part.n_buckets)
    return n_groups * tiling.tokens * per_token


def shares(part: Problem) -> int:
    """Return how many state heads share a key/value head: kernels over keys run once for each."""
    return part.n_state_heads // part.n_kv_heads


@contextmanager
def key_gradients(
    part: Problem, grads: GradientBuffers, d_out: Any
) -> Iterator[tuple[Problem, GradientBuffers, Any]]:
    """Yield the problem, the gradients and d_out in a dtype in which the state heads of a key/value
    head can be added up.

    Where planes or beta are per query head and queries are grouped, several state heads add to one
    row of `grads.key` and `grads.value`. In 16 bits every addition would be rounded: then this is
    done in copies of the dtype of the arithmetic.
    """
    if shares(part) == 1 or part.key is None or part.key.dtype == part.dtype:
        yield part, grads, d_out
        return
    wide = replace(
        part,
        **{name: _widened(getattr(part, name), part.dtype) for name in ("query", "key", "value")},
    )
    targets = {
        name: getattr(grads, name) for name in ("key", "value") if getattr(grads, name) is not None
    }
    sums = {name: empty(target.shape, part.dtype) for name, target in targets.items()}
    for name, target in targets.items():
        sums[name][...] = target  # rows of other parts and chunks
    yield wide, replace(grads, query=None, **sums), _widened(d_out, part.dtype)
    for name, target in targets.items():
        target[...] = sums[name].astype(target.dtype)


def _widened(array: Any, dtype: np.dtype) -> Any:
    return None if array is None else array.astype(dtype)


def new_sums(part: Problem, n_segments: int, n_heads: int) -> Any:
    """Return room for what segments add to states: [n, heads, S*(1+V)]."""
    return empty((n_segments, n_heads, part.n_buckets * (1 + part.value_dim)), np.float64)


def hash_width(total: Any) -> int:
    """Return the width of the rows of gradients of planes and beta, 0 where they are not wanted."""
    return 0 if total is None else int(total.shape[2])


def empty_hash_parts(chunk: np.ndarray, n_heads: int, total: Any) -> Any:
    """Return where tasks put their shares of `total`, gradients of planes and beta: [n, heads,
    width].
    """
    return empty((len(chunk), n_heads, hash_width(total)), np.float64)


def scan(owners: np.ndarray, parts: Any, carry: Any, *, reverse: bool = False) -> None:
    """Add parts [n, heads * repeats, width] to the carry [n_owners, heads, width] of their owners
    one by one.

    Leaves in the first of `repeats` neighbours what came before them.
    """
    if parts.size == 0:
        return
    heads, width = carry.shape[1:]
    table = cuda.to_device(np.ascontiguousarray(owners))
    n_blocks = -(-heads * width // _SCAN_THREADS)
    function = cuda.kernel("cuda/sums.cu", "scan", np.dtype(np.float64), 1)
    sizes = (len(owners), heads, parts.shape[1] // heads, width, int(reverse))
    function((n_blocks,), (_SCAN_THREADS,), (table, parts, carry, *map(np.int64, sizes)))
