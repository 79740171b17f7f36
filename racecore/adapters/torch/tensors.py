"""From tensors to arrays and back without copies, on PyTorch's stream and number of threads.

The traps: NumPy has no bfloat16 (its bits pass as int16), tensors with gradients are detached on
purpose (`function` registers the results with autograd), and tensors on a GPU must be used on
PyTorch's current stream.
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
    "target",
    "to_array",
    "torch_threads_or_stream",
]

_MOST_BYTES = 1 << 15  # of planes whose hash is kept for the next call


def to_array(tensor: torch.Tensor) -> Any:
    """View a tensor, detached, as a NumPy array, or as a CuPy array if it is on a GPU."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.device.type == "cpu":
        # a lazy minus sign, as in torch.view_as_imag(x.conj())
        tensor = tensor.resolve_neg()
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
    `tensor`.
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
    """Return an array for a result in PyTorch's memory pool of a GPU; None on the host.

    On the host, racecore allocates.
    """
    if like.device.type == "cpu":
        return None
    return to_array(torch.empty(shape, dtype=like.dtype, device=like.device))


def as_hash(planes: torch.Tensor, beta: Any) -> SoftLSH:
    """Return the hash, on the host, of planes and beta; this waits for tensors on a GPU."""
    array = to_array(planes if planes.device.type == "cpu" else planes.cpu())
    # a float for a 0-D tensor, else a list
    number = beta.tolist() if hasattr(beta, "tolist") else beta
    if isinstance(number, list):
        number = tuple(number)
    if array.nbytes > _MOST_BYTES or (
        isinstance(number, tuple) and any(isinstance(x, list) for x in number)
    ):
        return SoftLSH(array, number)
    return _hash_of(array.shape, array.dtype, array.tobytes(), number)


@lru_cache(maxsize=128)
def _hash_of(shape: tuple[int, ...], dtype: np.dtype, planes: bytes, beta: Any) -> SoftLSH:
    """Return the same hash object for the same numbers."""
    # kernels key their padded copies of the planes by the hash, and these take time to make
    return SoftLSH(np.frombuffer(planes, dtype).reshape(shape), beta)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast to the dtype of autocast, if enabled; float64 stays, as elsewhere in PyTorch."""
    kind = tensors[0].device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        x.to(dtype) if x.is_floating_point() and x.dtype is not torch.float64 else x
        for x in tensors
    )


def check_tensors(**named: Any) -> None:
    """Check that arguments are tensors or None, and rows on one device."""
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


def torch_threads_or_stream(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Compute with PyTorch's number of threads, or on its current stream of the tensor's GPU.

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
