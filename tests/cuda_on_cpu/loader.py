"""Compile a .cu file for the CPU behind cuda_on_cpu.h, and load it with CuPy's interface."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["SANITIZER_FLAGS", "Module"]

_HEADER = Path(__file__).with_name("cuda_on_cpu.h")
_FLAGS = (
    "-std=c++20",
    "-O1",
    "-g",
    "-fPIC",
    "-shared",
    "-fno-gnu-unique",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Werror",
)
SANITIZER_FLAGS = {
    "": (),
    "address": (
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
    ),
    "thread": ("-fsanitize=thread", "-DCUDA_ON_CPU_THREADS"),
}
_KERNEL = re.compile(r'extern "C" __global__ (?:__launch_bounds__\([^)]*\)\s+)?void (\w+)\(')


class Module:
    """A replacement of `cupy.RawModule`: the same source and options, compiled by g++."""

    def __init__(self, code: str, options: tuple[str, ...] = ()) -> None:
        defines = tuple(option for option in options if option.startswith("-D"))
        self._library = ctypes.CDLL(
            str(_compiled(code, defines, os.environ.get("CUDA_ON_CPU_SANITIZER", "")))
        )

    def get_function(self, name: str) -> Kernel:
        return Kernel(getattr(self._library, f"run_{name}"))


class Kernel:
    """A kernel, called as kernel(grid, block, arguments, shared_mem=bytes); synchronous."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(
        self,
        grid: tuple[int],
        block: tuple[int],
        arguments: tuple[Any, ...],
        *,
        shared_mem: int = 0,
    ) -> None:
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*(value.ctypes.data for value in values))
        self._function(*map(ctypes.c_uint, (*grid, *block)), ctypes.c_size_t(shared_mem), pointers)


def _value(argument: Any) -> np.ndarray:
    """Return the bytes of a kernel argument, as CuPy passes it."""
    # an array on the device: its address
    if hasattr(argument, "data") and hasattr(argument.data, "ptr"):
        return np.array(argument.data.ptr, np.int64)
    # a structure
    if isinstance(argument, np.ndarray) and argument.dtype.names and argument.size == 1:
        return argument
    if isinstance(argument, np.generic):
        return np.array(argument)
    raise TypeError(f"CuPy would not pass {type(argument)} as this kernel means it")


def _compiled(code: str, defines: tuple[str, ...], sanitizer: str) -> Path:
    launchers = "\n".join(
        f'extern "C" void run_{name}(unsigned grid, unsigned block, size_t shared_bytes, void** '
        "arguments) "
        f"{{ cuda_launch({name}, grid, block, shared_bytes, arguments); }}"
        for name in _KERNEL.findall(code)
    )
    memory = "alignas(256) double shared_memory[SHARED_BYTES / sizeof(double)];"
    text = f'{_HEADER.read_text()}\n#line 1 "kernels"\n{code}\n{memory}\n{launchers}\n'.replace(
        "#pragma once\n", ""
    )
    flags = (*_FLAGS, *SANITIZER_FLAGS[sanitizer], *defines)
    digest = hashlib.sha256("\0".join((text, *flags)).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "racecore-cuda-on-cpu"
    library = folder / f"{digest}.so"
    if not library.exists():
        if shutil.which("g++") is None:
            raise RuntimeError(
                "the CUDA kernels are tested as C++: install g++, version 12 or newer, on an "
                "x86-64 machine"
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            (Path(work) / "kernels.cpp").write_text(text)
            made = Path(work) / "kernels.so"
            command = ["g++", *flags, "-o", str(made), str(Path(work) / "kernels.cpp")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"g++ failed:\n{done.stderr[:8000]}")
            made.rename(library)
    return library
