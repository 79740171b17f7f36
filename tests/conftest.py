"""Every test runs with memory full of NaN; GPU tests where there is a GPU or one is required."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
from cuda_on_cpu import fake_cupy
from devices import Gpu, reason_without_gpu, wants_gpu

from racecore.runtime import arrays

hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "ci", deadline=None, print_blob=True, derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def _fill(array: np.ndarray) -> np.ndarray:
    """Fill with NaN, or with the lowest integer: what a caller must not find in a result."""
    if array.dtype.kind in "iu":
        array.fill(np.iinfo(array.dtype).min)
    elif array.dtype.kind != "b":
        array.fill(np.nan)
    return array


class _NumPyWithFilledEmpty(ModuleType):
    """NumPy as a module of plain Python sees it, with an `empty` that is full of NaN."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def empty(*args: Any, **options: Any) -> np.ndarray:
        return _fill(np.empty(*args, **options))

    @staticmethod
    def empty_like(*args: Any, **options: Any) -> np.ndarray:
        return _fill(np.empty_like(*args, **options))


@pytest.fixture(scope="session", autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Let racecore allocate NaN in place of whatever memory happens to hold.

    Compiled kernels resolve NumPy when they are compiled, so only the modules without kernels get
    another NumPy; what kernels write for a caller is allocated by `racecore.runtime.arrays.empty`.
    """
    from racecore.ops import reference_rows
    from racecore.ops.bidirectional import reference as bidirectional
    from racecore.ops.causal import reference as causal
    from racecore.ops.socket import cpu as socket_cpu
    from racecore.ops.socket import reference as socket
    from racecore.ops.socket.attend import splits as socket_splits
    from racecore.ops.soft_hash import reference as soft_hash

    genuine = arrays.empty

    def empty(shape: tuple[int, ...], dtype: Any, on_device: bool = False) -> Any:
        return genuine(shape, dtype, True) if on_device else _fill(genuine(shape, dtype))

    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("racecore") and getattr(module, "empty", None) is genuine:
                patch.setattr(module, "empty", empty)
        for module in (
            reference_rows,
            bidirectional,
            causal,
            socket,
            socket_cpu,
            socket_splits,
            soft_hash,
            sys.modules["racecore.chunking"],
        ):
            patch.setattr(module, "np", _NumPyWithFilledEmpty("numpy"))
        yield


@pytest.fixture(autouse=True)
def cupy_of_the_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let a test of the backend "cuda" find a CuPy whose kernels run on the CPU; one of `Gpu` finds
    the real one.
    """
    callspec = getattr(request.node, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if backend == "cuda" and not isinstance(backend, Gpu):
        with fake_cupy.install():
            yield
    else:
        yield


def pytest_report_header() -> str:
    return f"GPU: {reason_without_gpu() or 'tested'}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of a GPU where there is none and none is required."""
    if wants_gpu():
        return
    left_out = [item for item in items if item.get_closest_marker("gpu") is not None]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and (reason := reason_without_gpu()):
        pytest.fail(f"RACECORE_REQUIRE_GPU=1, but no GPU test can run: {reason}")
