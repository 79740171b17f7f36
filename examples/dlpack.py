"""The same attention from NumPy, CuPy and torch arrays by DLPack: `python examples/dlpack.py`.

racecore imports none of these libraries: it takes an array that supports DLPack and returns an
array of the same library. Libraries that are not installed or need a missing GPU are skipped with a
message.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

import racecore


def cupy_arrays(arrays: list[np.ndarray]) -> tuple[list[Any], Callable[[Any], np.ndarray]]:
    """Copy to the GPU; return the arrays and the function that converts back to NumPy."""
    import cupy

    if cupy.cuda.runtime.getDeviceCount() == 0:
        raise RuntimeError("CuPy is installed, but there is no GPU")
    return [cupy.asarray(x) for x in arrays], cupy.asnumpy


def torch_arrays(arrays: list[np.ndarray]) -> tuple[list[Any], Callable[[Any], np.ndarray]]:
    """Wrap as torch tensors; nothing is copied."""
    import torch

    return [torch.from_dlpack(x) for x in arrays], lambda tensor: tensor.numpy()


def torch_bfloat16(arrays: list[np.ndarray]) -> tuple[list[Any], Callable[[Any], np.ndarray]]:
    """Round to bfloat16, which passes through DLPack as bits (needs ml_dtypes)."""
    import ml_dtypes  # noqa: F401
    import torch

    return [
        torch.from_dlpack(x).to(torch.bfloat16) for x in arrays
    ], lambda tensor: tensor.float().numpy()


def main(n_tokens: int = 20_000) -> None:
    """Run forward and backward from every installed library and compare with NumPy."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((n_tokens, 4, 64), dtype=np.float32) for _ in range(3)]
    out, saved = racecore.attention_forward(*arrays, is_causal=True)
    expected = racecore.attention_backward(out, saved).key
    print(
        f"numpy           {type(out).__name__} {out.dtype} {tuple(out.shape)}, the reference "
        "to compare "
        "with"
    )

    for name, convert in (
        ("cupy", cupy_arrays),
        ("torch", torch_arrays),
        ("torch bfloat16", torch_bfloat16),
    ):
        try:
            foreign, to_numpy = convert(arrays)
        except ImportError as error:
            print(f"{name:<15} skipped: {error.name} is not installed")
            continue
        except Exception as error:  # an installed CuPy without a driver has many ways to say so
            print(f"{name:<15} skipped: {error}")
            continue
        try:
            result, saved = racecore.attention_forward(*foreign, is_causal=True)
            d_key = racecore.attention_backward(result, saved).key
        except TypeError as error:
            print(f"{name:<15} not yet: {error}")
            continue
        errors = [
            np.abs(to_numpy(a) - b).max() / np.abs(b).max()
            for a, b in ((result, out), (d_key, expected))
        ]
        kind = f"{type(result).__module__}.{type(result).__name__} {result.dtype}"
        print(
            f"{name:<15} {kind} {tuple(result.shape)}, relative difference {errors[0]:.1e}, "
            f"gradient of keys {errors[1]:.1e}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    main(parser.parse_args().tokens)
