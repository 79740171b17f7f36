"""The one place with Numba's options, and with the cache of compiled kernels.

`helper` compiles functions that kernels call; `kernel` compiles what Python launches and keeps it on disk. Both compile
on first use. Flags are named one by one: fast-math as a whole would delete the checks for NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

from racecore import kernel_cache

__all__ = ["exact_helper", "helper", "kernel"]

# contract: fused multiply-add. reassoc: sums in vector lanes. nsz: the sign of a zero does not matter.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}}
_EXACT: dict[str, Any] = {**_OPTIONS, "fastmath": {"contract"}}


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call."""
    return numba.njit(**_OPTIONS)(function)


def exact_helper(function: Callable[..., Any]) -> Any:
    """Compile a function whose operations must keep their order, such as an argument reduction."""
    return numba.njit(**_EXACT)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that Python launches; its compiled form is kept on disk."""
    return kernel_cache.attach(numba.njit(**_OPTIONS)(function))
