"""NVRTC, NVIDIA's run-time compiler, called from its wheel: it needs no driver and no GPU."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

__all__ = ["compiled"]


@cache
def _library() -> ctypes.CDLL:
    # the packages of the wheel
    for package in ("nvidia.cu13", "nvidia.cuda_nvrtc"):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            continue
        for folder in found.submodule_search_locations or () if found else ():
            for path in sorted(Path(folder, "lib").glob("libnvrtc.so*")):
                for builtins in Path(folder, "lib").glob("libnvrtc-builtins.so*"):
                    # NVRTC loads it by its bare name
                    ctypes.CDLL(str(builtins))
                return ctypes.CDLL(str(path))
    raise ImportError("libnvrtc is not installed: pip install nvidia-cuda-nvrtc==13.0.88")


def compiled(
    code: str, options: tuple[str, ...], architecture: str, kind: str = "CUBIN"
) -> tuple[bytes, str]:
    """Compile for an architecture such as "sm_90"; return machine code or "PTX", and the log.

    Raises
    ------
    RuntimeError
        With the log.
    """
    library, program = _library(), ctypes.c_void_p()
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None
        )
    )
    try:
        flags = [
            option.encode()
            for option in (*options, f"--gpu-architecture={architecture}", "--ptxas-options=-v")
        ]
        failed = library.nvrtcCompileProgram(
            program, len(flags), (ctypes.c_char_p * len(flags))(*flags)
        )
        log = _text(program, "ProgramLog").decode()
        if failed:
            raise RuntimeError(f"NVRTC failed for {architecture}:\n{log}")
        return _text(program, kind), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(program: ctypes.c_void_p, kind: str) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(_library(), f"nvrtcGet{kind}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(_library(), f"nvrtcGet{kind}")(program, buffer))
    return buffer.raw.rstrip(b"\0") if kind == "ProgramLog" else buffer.raw


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC returned error {status}")
