"""exp and tanh that a compiler can vectorise.

The C library's versions cost 2 to 8 ns a value, because calls to them stay scalar inside compiled loops. In float32
these polynomials err by about 1e-7 relative and become vector code; in float64 the C library's are used. The plain
twins are `numpy.exp` and `numpy.tanh`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from racecore.jit import exact_helper

__all__ = ["bits_of", "exp_of_nonpositive", "float_of_bits", "tanh"]

_LOG2_E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)  # 9 bits: its product with a small integer is exact
_LN2_LOW = np.float32(-2.12194440e-4)
_LOWEST = np.float32(-87.0)  # exp of this is just above the smallest normal number


@intrinsic
def float_of_bits(typing_context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), code


@intrinsic
def bits_of(typing_context: Any, value: Any) -> Any:
    """Reinterpret a float32 as 32 bits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), code


@exact_helper
def _exp32(x: np.float32) -> np.float32:
    """Return exp(x) for x <= 0: 2^n * exp(r) with |r| <= ln(2)/2 and a polynomial for exp(r)."""
    x = max(x, _LOWEST)
    n = np.floor(x * _LOG2_E + np.float32(0.5))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)  # coefficients: Cephes' expf
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    y = p * r * r + r + np.float32(1.0)
    return y * float_of_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@exact_helper
def _tanh32(x: np.float32) -> np.float32:
    """Return tanh(x): an odd polynomial near 0, where (1 - e) / (1 + e) would lose relative accuracy."""
    e = _exp32(np.float32(-2.0) * abs(x))
    large = (np.float32(1.0) - e) / (np.float32(1.0) + e)
    large = large if x >= np.float32(0.0) else -large
    s = x * x
    p = np.float32(-5.70498872745e-3)  # coefficients: Cephes' tanhf
    p = p * s + np.float32(2.06390887954e-2)
    p = p * s + np.float32(-5.37397155531e-2)
    p = p * s + np.float32(1.33314422036e-1)
    p = p * s + np.float32(-3.33332819422e-1)
    small = p * s * x + x
    return small if abs(x) < np.float32(0.625) else large


# Numba compares the signatures of the next functions with those of their overloads, annotations included: so none here.
def exp_of_nonpositive(x):
    """Return exp(x) for x <= 0, in the dtype of x."""
    return np.exp(x)


def tanh(x):
    """Return tanh(x), in the dtype of x."""
    return np.tanh(x)


@overload(exp_of_nonpositive)
def _exp_by_type(x):
    return (lambda x: _exp32(x)) if x == types.float32 else (lambda x: math.exp(x))


@overload(tanh)
def _tanh_by_type(x):
    return (lambda x: _tanh32(x)) if x == types.float32 else (lambda x: math.tanh(x))
