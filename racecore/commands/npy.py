"""Memory maps of .npy files: opened only if the file is exactly what its header says, made only if the disk has room."""

from __future__ import annotations

import os
import tokenize
from typing import Any, BinaryIO

import numpy as np

from racecore import arrays
from racecore.commands.bad_input import BadInputError

__all__ = ["create", "finish", "open_array"]


def open_array(path: str, dtype_name: str | None = None) -> np.memmap:
    """Map an .npy file for reading.

    Parameters
    ----------
    path : str
    dtype_name : {None, "bfloat16"}
        "bfloat16" reads entries of two untyped bytes as bfloat16: that is how NumPy stores ml_dtypes.bfloat16.

    Raises
    ------
    BadInputError
        It cannot be read, is no .npy file, is shorter or longer than its header says, or holds no supported floats.
    """
    try:
        with open(path, "rb") as file:
            shape, fortran_order, dtype = _read_header(file, path)
            offset, size = file.tell(), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    dtype = _checked_dtype(dtype, dtype_name, path)
    if len(shape) not in (3, 4):
        raise BadInputError(f"{path} has shape {shape}; expected [tokens, heads, dim] or [batch, tokens, heads, dim]")
    expected = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
    if size != expected:
        what = "was cut short" if size < expected else "has bytes to spare"
        raise BadInputError(
            f"{path} {what}: its header ({dtype}, shape {shape}) means {expected:,} bytes, the file has {size:,}; "
            "write it again with numpy.save"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran_order else "C")


def _read_header(file: BinaryIO, path: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    try:
        version = np.lib.format.read_magic(file)
        # Versions 2 and 3 differ in how non-ASCII field names are encoded, and floats have no fields.
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if any(isinstance(n, bool) or n < 0 for n in shape):
            raise ValueError(f"its header has the shape {shape}")
        return shape, fortran_order, dtype
    except (ValueError, TypeError, SyntaxError, tokenize.TokenError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInputError(f"{path} is not an .npy file ({reason}); write one with numpy.save") from error


def _checked_dtype(dtype: np.dtype, dtype_name: str | None, path: str) -> np.dtype:
    if dtype == np.dtype("V2"):
        if dtype_name != "bfloat16":
            raise BadInputError(
                f"{path} holds entries of two untyped bytes. If they are bfloat16 (NumPy stores ml_dtypes.bfloat16 so), "
                "add --dtype bfloat16"
            )
        return _bfloat16()
    if dtype_name == "bfloat16":
        raise BadInputError(f"{path} holds {dtype}, which says what it is; leave out --dtype bfloat16")
    if not arrays.is_supported(dtype):
        raise BadInputError(
            f"{path} holds {dtype}; expected float16, float32, float64, or bfloat16 with --dtype bfloat16. "
            "Convert it with numpy.save(path, array.astype(numpy.float32))"
        )
    return dtype


def _bfloat16() -> np.dtype:
    try:
        import ml_dtypes
    except ImportError:
        raise BadInputError("--dtype bfloat16 needs the package ml_dtypes: pip install 'racecore[bf16]'") from None
    return np.dtype(ml_dtypes.bfloat16)


def create(path: str, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Make an .npy file with all its bytes reserved on the disk, and map it for writing.

    A sparse file would do until the disk is full; then the first write through the map would kill the process.

    Raises
    ------
    OSError
        There is no room for it, or the folder cannot be written to.
    """
    with open(path, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        offset = file.tell()
        size = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(error.errno, f"cannot reserve {size:,} bytes: {error.strerror}", path) from None
    return np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=shape)


def finish(array: np.memmap) -> None:
    """Wait until everything that was written to the map is on the disk."""
    array.flush()
