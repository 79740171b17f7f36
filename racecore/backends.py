"""The choice of an implementation: reference (plain NumPy), cpu (Numba) or cuda; and why not."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from racecore.errors import BackendUnavailableError
from racecore.runtime import cuda

__all__ = ["NAMES", "Backend", "available", "choose", "needs_device"]

NAMES = ("reference", "cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """One implementation of every operation: modules with the same functions in every backend."""

    name: str
    soft_hash: ModuleType
    bidirectional: ModuleType
    causal: ModuleType
    decoding: ModuleType

    @property
    def socket(self) -> ModuleType:
        """The operations of sparse decoding, imported at the first use."""
        return importlib.import_module(f"racecore.ops.socket.{self.name}")


def available() -> dict[str, str | None]:
    """Return for every backend None if it can run here, else the reason why not.

    Returns
    -------
    dict of str to (str or None)
        In the order in which `racecore doctor` lists them.
    """
    return {name: reason() for name, reason in _REASONS.items()}


def _reason_without(package: str) -> str | None:
    return (
        None
        if importlib.util.find_spec(package)
        else f"{package} is not installed: pip install {package}"
    )


_REASONS: dict[str, Callable[[], str | None]] = {
    "reference": lambda: _reason_without("scipy"),
    "cpu": lambda: _reason_without("numba"),
    "cuda": cuda.reason_unavailable,
}


def needs_device(name: str | None) -> bool | None:
    """Return True if a backend needs its arrays on a GPU, else None: it leaves them where they are.

    Raises
    ------
    racecore.errors.BackendUnavailableError
        A GPU is needed and cannot be used here.
    """
    return True if name == "cuda" and choose(name) else None


def choose(name: str | None, on_device: bool = False) -> Backend:
    """Return the backend called `name`; None means the fastest that runs here for these arrays.

    Raises
    ------
    ValueError
        There is no backend of that name, or it cannot work on the device of the arrays.
    racecore.errors.BackendUnavailableError
        It cannot run here; the message lists every backend with its reason.
    """
    if name is None:
        name = "cuda" if on_device else _default()
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(
            f"backend must be None or one of {', '.join(map(repr, NAMES))}, got {name!r}"
        )
    if on_device and name != "cuda":
        raise ValueError(
            f"backend={name!r} works in host memory, and these arrays are on a GPU: copy them to "
            "the host with cupy.asnumpy, or "
            "leave backend out"
        )
    return _load(name)


@cache
def _default() -> str:
    for name in ("cpu", "reference"):
        if _REASONS[name]() is None:
            return name
    raise BackendUnavailableError("cpu", available())


@cache
def _load(name: str) -> Backend:
    if _REASONS[name]() is not None:
        raise BackendUnavailableError(name, available())
    operations = ("soft_hash", "bidirectional", "causal", "decoding")
    return Backend(
        name,
        *(importlib.import_module(f"racecore.ops.{operation}.{name}") for operation in operations),
    )
