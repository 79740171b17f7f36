"""From tensors to arrays and back, without copies; the stream and the number of threads that
PyTorch would use.

The traps on this way: NumPy knows no bfloat16 (its bits pass as int16), tensors that autograd
watches are detached knowingly (`function` tells autograd of the results), and tensors on a GPU must
be used on the stream that PyTorch works on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from racecore.runtime import arrays, cuda
from racecore.runtime.threads import requested, threads
from racecore.soft_lsh import SoftLSH

__all__ = [
    "array_options",
    "as_hash",
    "as_like",
    "as_tensor",
    "autocast",
    "check_tensors",
    "same_place",
    "target",
    "to_array",
]

_MOST_BYTES = 1 << 15  # of planes whose hash is kept for the next call


def to_array(tensor: torch.Tensor) -> Any:
    """View a tensor as a NumPy array, or as a CuPy array where it is on a GPU; what autograd
    watches is left behind.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.device.type == "cpu":
        tensor = tensor.resolve_neg()  # a lazy minus sign, as torch.view_as_imag(x.conj()) has
        if tensor.dtype is torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(arrays.dtype_of("bfloat16"))
        return tensor.numpy()
    return arrays.as_array(tensor, f"a tensor on {tensor.device}")


def array_options(
    is_causal: bool, readout: str, key_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> dict[str, Any]:
    """Return the options of `racecore.attention` for those of `race_attention`."""
    return {
        "is_causal": is_causal,
        "readout": readout,
        "key_mask": None if key_mask is None else to_array(key_mask),
        "cu_seqlens": None if cu_seqlens is None else to_array(cu_seqlens),
    }


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
    """Return a gradient of planes or beta, float64 or a float, in the dtype and on the device of
    what it belongs to.
    """
    if gradient is None:
        return None
    found = (
        as_tensor(gradient)
        if hasattr(gradient, "dtype")
        else torch.tensor(gradient, dtype=torch.float64)
    )
    return found.to(device=tensor.device, dtype=tensor.dtype)


def target(shape: tuple[int, ...], like: torch.Tensor) -> Any:
    """Return an array on a GPU in memory from PyTorch's pool to write a result to; None on the
    host, where racecore allocates.
    """
    if like.device.type == "cpu":
        return None
    return to_array(torch.empty(shape, dtype=like.dtype, device=like.device))


def as_hash(planes: torch.Tensor, beta: Any) -> SoftLSH:
    """Return the hash of tensors of planes and beta. It lives on the host, so tensors on a GPU are
    waited for.
    """
    array = to_array(planes if planes.device.type == "cpu" else planes.cpu())
    number = beta.tolist() if hasattr(beta, "tolist") else beta  # a float for one that has no axes
    if isinstance(number, list):
        number = tuple(number)
    if array.nbytes > _MOST_BYTES or (
        isinstance(number, tuple) and any(isinstance(x, list) for x in number)
    ):
        return SoftLSH(array, number)
    return _hash_of(array.shape, array.dtype, array.tobytes(), number)


@lru_cache(maxsize=128)
def _hash_of(shape: tuple[int, ...], dtype: np.dtype, planes: bytes, beta: Any) -> SoftLSH:
    """Return the same hash for the same numbers: a `SoftLSH` keeps what kernels want of it, which
    takes time to make.
    """
    return SoftLSH(np.frombuffer(planes, dtype).reshape(shape), beta)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the dtype of autocast where that is on; float64 stays, as elsewhere in PyTorch."""
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x
        for x in tensors
    )


def check_tensors(**named: Any) -> None:
    """Check that arguments are tensors and rows on one device; None is left alone."""
    for name, tensor in named.items():
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, got {type(tensor).__qualname__}; torch.as_tensor "
                "makes one"
            )
    query, key, value = named["query"].device, named["key"].device, named["value"].device
    if not query == key == value:
        raise ValueError(
            f"query, key and value must be on one device, got {query}, {key} and {value}"
        )


def same_place(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Compute where PyTorch does: with its number of threads, or on the current stream of the
    tensor's GPU.

    `racecore.threads` has precedence. A data loader's worker has one thread for PyTorch, and so for
    racecore.
    """
    if tensor.device.type != "cpu":
        return _on_its_stream(tensor)
    return threads(torch.get_num_threads()) if requested() is None else nullcontext()


@contextmanager
def _on_its_stream(tensor: torch.Tensor) -> Iterator[None]:
    cupy = cuda.cupy()
    stream = torch.cuda.current_stream(tensor.device)
    with cupy.cuda.Device(tensor.device.index), cupy.cuda.ExternalStream(stream.cuda_stream):
        yield
