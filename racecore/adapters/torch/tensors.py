"""From tensors to arrays and back, without copies; the stream and the number of threads that PyTorch would use.

The traps on this way: NumPy knows no bfloat16 (its bits pass as int16), no array may share memory with a tensor that
autograd still watches (tensors are detached knowingly, by the callers in `function`), and tensors on a GPU must be
used on the stream that PyTorch works on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from racecore import arrays, cuda
from racecore.soft_lsh import SoftLSH
from racecore.threads import requested, threads

__all__ = ["as_hash", "as_like", "as_tensor", "same_place", "target", "to_array"]


def to_array(tensor: torch.Tensor) -> Any:
    """View a detached tensor as a NumPy array, or as a CuPy array where it is on a GPU."""
    if tensor.device.type == "cpu":
        tensor = tensor.resolve_neg()  # a lazy minus sign, as torch.view_as_imag(x.conj()) has
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(arrays.dtype_of("bfloat16"))
        return tensor.numpy()
    return arrays.as_array(tensor, f"a tensor on {tensor.device}")


def as_tensor(array: Any) -> torch.Tensor:
    """View a fresh array as a tensor."""
    if cuda.is_array(array):
        if arrays.is_bfloat16(array.dtype):
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)
    if arrays.is_bfloat16(array.dtype):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_like(gradient: Any, tensor: Any) -> torch.Tensor | None:
    """Return a gradient of planes or beta, float64 or a float, in the dtype and on the device of what it belongs to."""
    if gradient is None:
        return None
    found = as_tensor(gradient) if hasattr(gradient, "dtype") else torch.tensor(gradient, dtype=torch.float64)
    return found.to(device=tensor.device, dtype=tensor.dtype)


def target(shape: tuple[int, ...], like: torch.Tensor) -> Any:
    """Return an array on a GPU in memory from PyTorch's pool to write a result to; None on the host, where racecore allocates."""
    if like.device.type == "cpu":
        return None
    return to_array(torch.empty(shape, dtype=like.dtype, device=like.device))


def as_hash(planes: torch.Tensor, beta: Any) -> SoftLSH:
    """Return the hash of tensors of planes and beta. It lives on the host, so tensors on a GPU are waited for."""
    array, number = to_array(planes.detach().cpu()), beta
    if isinstance(beta, torch.Tensor):
        number = tuple(beta.tolist()) if beta.ndim else beta.item()
    return _hash_of(array.shape, array.dtype, array.tobytes(), number)


@lru_cache(maxsize=256)
def _hash_of(shape: tuple[int, ...], dtype: np.dtype, planes: bytes, beta: Any) -> SoftLSH:
    """Return the same hash for the same numbers: a `SoftLSH` keeps what kernels want of it, which takes time to make."""
    return SoftLSH(np.frombuffer(planes, dtype).reshape(shape), beta)


@contextmanager
def same_place(tensor: torch.Tensor) -> Iterator[None]:
    """Compute where PyTorch does: with its number of threads, or on the current stream of the tensor's GPU.

    `racecore.threads` has precedence. A data loader's worker has one thread for PyTorch, and so for racecore.
    """
    if tensor.device.type != "cpu":
        cupy = cuda.cupy()
        stream = torch.cuda.current_stream(tensor.device)
        with cupy.cuda.Device(tensor.device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
            yield
    elif requested() is None:
        with threads(torch.get_num_threads()):
            yield
    else:
        yield
