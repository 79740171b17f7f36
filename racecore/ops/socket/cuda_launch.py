"""Common parts of SOCKET's CUDA launches: sizes, planes on the device, the launch itself."""

from __future__ import annotations

from typing import Any
from weakref import ref

import numpy as np

from racecore.ops.socket.layout import BLOCK_TOKENS
from racecore.runtime import cuda

__all__ = [
    "ENOUGH_BLOCKS",
    "MAX_BLOCKS",
    "ROWS_FILE",
    "SELECTION_FILE",
    "SHARED_BYTES",
    "TILE",
    "TOKENS",
    "address",
    "columns_per_lane",
    "device_planes",
    "launch",
    "whole_blocks",
    "whole_tiles",
]

ROWS_FILE, SELECTION_FILE = "socket/kernels.cu", "socket/selection.cu"
# tokens of a group and rows of a tile, as in ops/cuda/warp.cuh without tensor cores
TOKENS, TILE = 8, 4
# shared memory of a block without opting in
SHARED_BYTES = 48 << 10
MAX_BLOCKS = 1 << 20
# so many blocks keep every multiprocessor busy to the end
ENOUGH_BLOCKS = 4096


def columns_per_lane(*widths: int) -> int:
    """Return the columns per lane: 2 or 4.

    Not 1: rows of at most 32 are rare here, and every number is one more compilation.
    """
    return 2 if max(widths) <= 2 * cuda.LANES else 4


def address(array: Any) -> int:
    """Return the address of a device array, 0 for None."""
    return 0 if array is None else array.data.ptr


def launch(
    file: str,
    name: str,
    dtype: np.dtype,
    columns: int,
    n_tasks: int,
    threads: int,
    shared_bytes: int,
    *arguments: Any,
) -> None:
    """Run a kernel; block b takes the tasks b, b + number of blocks, ..."""
    if n_tasks > 0:
        function = cuda.kernel(file, name, dtype, columns)
        function((min(n_tasks, MAX_BLOCKS),), (threads,), arguments, shared_mem=shared_bytes)


_kept_planes: dict[tuple[Any, ...], tuple[Any, Any]] = {}


def device_planes(
    planes: np.ndarray, dtype: np.dtype, columns: int
) -> tuple[Any, list[tuple[str, int]]]:
    """Return planes [G, L, P, D] on the device, padded, and the fields of a kernel's `Planes`.

    A hash returns the same array every time (`SoftLSH.per_head`), so its copy is kept as long as
    the array lives. Later uses may be on another stream: the first one waits for the copy.
    """
    library = cuda.cupy()
    name = id(planes), library, library.cuda.Device().id, dtype.char, columns
    kept = _kept_planes.get(name)
    if kept is None or kept[0]() is not planes:
        padded = cuda.to_device(_padded(planes, dtype, cuda.LANES * columns))
        kept = ref(planes, lambda _: _kept_planes.pop(name, None)), padded
        if not planes.flags.writeable:
            library.cuda.get_current_stream().synchronize()
            _kept_planes[name] = kept
    _, n_tables, n_planes, head_dim = planes.shape
    fields = {
        "data": kept[1].data.ptr,
        "per_head": len(kept[1]) > 1,
        "n_tables": n_tables,
        "n_planes": n_planes,
    }
    return kept[1], [
        (f"planes.{label}", value) for label, value in (fields | {"head_dim": head_dim}).items()
    ]


def _padded(planes: np.ndarray, dtype: np.dtype, slab: int) -> np.ndarray:
    """Return planes [G, L, P, D] as [G or 1, L*P, D], zero-padded to whole slabs and tiles."""
    # one copy if the heads share their planes
    distinct = planes[:1] if planes.strides[0] == 0 else planes
    heads, n_tables, n_planes, head_dim = distinct.shape
    padded = np.zeros((heads, whole_tiles(n_tables * n_planes), -(-head_dim // slab) * slab), dtype)
    padded[:, : n_tables * n_planes, :head_dim] = distinct.reshape(heads, -1, head_dim)
    return padded


def whole_tiles(n_rows: int) -> int:
    """Return the number of rows, rounded up to whole tiles."""
    return -(-n_rows // TILE) * TILE


def whole_blocks(n_tokens: int) -> int:
    """Return the number of tokens, rounded up to whole blocks of codes."""
    return -(-n_tokens // BLOCK_TOKENS) * BLOCK_TOKENS
