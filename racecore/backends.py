"""Which implementation runs: reference (plain NumPy), cpu (Numba) or cuda, and the reason for each that cannot."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from racecore.errors import BackendUnavailableError

__all__ = ["NAMES", "Backend", "available", "choose"]

NAMES = ("reference", "cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation: modules with the same functions, whichever backend it is."""

    name: str
    soft_hash: ModuleType
    bidirectional: ModuleType
    causal: ModuleType


def available() -> dict[str, str | None]:
    """Return for every backend None if it can run here, else the reason why not.

    Returns
    -------
    dict of str to (str or None)
        In the order in which `racecore doctor` lists them.
    """
    no_numba = None if importlib.util.find_spec("numba") else "numba is not installed: pip install numba"
    no_scipy = None if importlib.util.find_spec("scipy") else "scipy is not installed: pip install scipy"
    return {
        "reference": no_scipy,
        "cpu": no_numba,
        "cuda": "this version of racecore has no CUDA kernels yet",
    }


def choose(name: str | None) -> Backend:
    """Return the backend called `name`; None means the fastest that runs here.

    Raises
    ------
    ValueError
        There is no backend of that name.
    racecore.errors.BackendUnavailableError
        It cannot run here; the message lists every backend with its reason.
    """
    if name is None:
        name = _default()
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return _load(name)


@cache
def _default() -> str:
    reasons = available()
    for name in ("cpu", "reference"):
        if reasons[name] is None:
            return name
    raise BackendUnavailableError("cpu", reasons)


@cache
def _load(name: str) -> Backend:
    reasons = available()
    if reasons[name] is not None:
        raise BackendUnavailableError(name, reasons)
    operations = ("soft_hash", "bidirectional", "causal")
    return Backend(name, *(importlib.import_module(f"racecore.ops.{operation}.{name}") for operation in operations))
