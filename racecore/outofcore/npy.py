""".npy files: headers checked against the file size, outputs with all bytes reserved."""

from __future__ import annotations

import io
import math
import os
import tokenize
from typing import Any, BinaryIO, NamedTuple

import numpy as np

__all__ = ["Header", "create", "read_header", "reserve"]


class Header(NamedTuple):
    """The header of an .npy file; `offset` is that of the first byte of the array."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    offset: int


def read_header(path: str) -> Header:
    """Read the header of an .npy file and compare it with the size of the file.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is no .npy file, or its size does not match its header.
    """
    with open(path, "rb") as file:
        shape, fortran_order, dtype = _parse(file, path)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if dtype.hasobject:
        raise ValueError(f"{path} holds {dtype}; expected numbers")
    expected = offset + math.prod(shape) * dtype.itemsize
    if size != expected:
        problem = "was cut short" if size < expected else "has bytes to spare"
        raise ValueError(
            f"{path} {problem}: its header ({dtype}, shape {shape}) means {expected:,} bytes, the "
            f"file has {size:,}; "
            "write it again with numpy.save"
        )
    return Header(shape, dtype, fortran_order, offset)


def _parse(file: BinaryIO, path: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        # Versions 2 and 3 differ in how non-ASCII field names are encoded, and numbers have no
        # fields.
        read: Any = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran_order, dtype = read(file)
        if any(isinstance(n, bool) or n < 0 for n in shape):
            raise ValueError(f"its header has the shape {shape}")
        return shape, fortran_order, dtype
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is not an .npy file ({reason}); write one with numpy.save"
        ) from error


def reserve(file: int, path: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Make an open file an .npy file with all its bytes reserved on the disk; return the offset of
    the array's first byte.

    The data of a file that has this header and size already are kept. With a sparse file a full
    disk would show late, and would kill a process that writes through a memory map.

    Parameters
    ----------
    file : int
        File descriptor.
    path : str
        For messages.
    shape, dtype
        Of the array.

    Raises
    ------
    OSError
        The disk has no space for it, or the folder cannot be written to.
    """
    header = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    offset = header.tell()
    size = offset + math.prod(shape) * dtype.itemsize
    # Resuming: the rows that an earlier run wrote are still wanted.
    if os.fstat(file).st_size != size or os.pread(file, offset, 0) != header.getvalue():
        os.ftruncate(file, 0)
    try:
        os.posix_fallocate(file, 0, size)
        os.pwrite(file, header.getvalue(), 0)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot reserve {size:,} bytes: {error.strerror}", path
        ) from None
    return offset


def create(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Create an .npy file with all its bytes reserved on the disk, and map it for writing.

    Raises
    ------
    OSError
        The disk has no space for it, or the folder cannot be written to.
    """
    with open(path, "w+b") as file:
        offset = reserve(file.fileno(), path, shape, dtype)
    return np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=shape)
