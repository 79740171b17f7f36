"""Features of the processor that Numba compiles for."""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm
import numba

__all__ = ["has"]


@cache
def has(feature: str) -> bool:
    """Return whether the processor has a feature, by LLVM's name, such as "avx512f"."""
    if numba.config.CPU_NAME not in (None, "", "host") and numba.config.CPU_FEATURES is None:
        return False
    if numba.config.CPU_FEATURES is not None:
        return f"+{feature}" in numba.config.CPU_FEATURES.split(",")
    llvm.initialize_native_asmparser()
    return bool(llvm.get_host_cpu_features().get(feature, False))
