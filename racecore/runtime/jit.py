"""The one module with Numba's options, and with the cache of compiled kernels.

`helper` compiles functions that kernels call; `kernel` compiles functions that Python launches, and
keeps them on disk. Both compile on first use. Flags are named one by one: fast-math as a whole
would delete the checks for NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numba
from numba.core.compiler_lock import global_compiler_lock

from racecore.runtime import kernel_cache

__all__ = ["exact_helper", "helper", "inlined", "kernel", "piece"]

# contract: fused multiply-add. reassoc: sums in vector lanes. nsz: the sign of a zero does not
# matter.
_OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": {"contract", "reassoc", "nsz"},
}
# Only compiled code calls helpers: entries for Python and C would double the time to compile them.
_INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_EXACT: dict[str, Any] = {**_OPTIONS, "fastmath": {"contract"}}


def helper(function: Callable[..., Any]) -> Any:
    """Compile a function that only kernels call."""
    return numba.njit(**_OPTIONS, **_INNER)(function)


def piece(function: Callable[..., Any]) -> Any:
    """Compile a function as part of its only caller, so that it is optimised once."""
    return numba.njit(**_OPTIONS, inline="always")(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function of a few instructions without the cost of a call, in their exact order."""
    return numba.njit(**_EXACT, **_INNER, forceinline=True)(function)


def exact_helper(function: Callable[..., Any]) -> Any:
    """Compile a function whose operations must keep their order, such as an argument reduction."""
    return numba.njit(**_EXACT)(function)


def kernel(function: Callable[..., Any], variant: str = "") -> Any:
    """Compile a function that Python launches; its compiled form is kept on disk.

    A function made by a factory needs the name of its variant, because files in the cache are named
    after functions.
    """
    if variant:
        function.__qualname__ = f"{function.__name__}_{variant}"
    return kernel_cache.attach(numba.njit(**_OPTIONS)(function))


if hasattr(os, "register_at_fork"):
    # A child forked while another thread compiles would find Numba's lock taken for ever: the fork
    # waits for it.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
