"""exp, tanh and sigmoids of vectors.

The C library's versions cost 2 to 8 ns a number, because calls to them stay scalar inside compiled
loops. In float32 these polynomials have relative errors of about 1e-7 and cost a few instructions
for 16 numbers; float64 uses the C library's, lane by lane. The plain twins are `numpy.exp` and
`numpy.tanh`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from racecore.ops.simd.vectors import (
    Vector,
    absolute,
    at_least,
    exp_by_lanes,
    floor,
    fma,
    maximum,
    power_of_two,
    select,
    splat,
    tanh_by_lanes,
)
from racecore.runtime.jit import inlined

__all__ = ["exp_of_nonpositive", "sigmoids", "tanh"]

_LOG2_E = np.float32(1.44269504)
# ln(2) in two parts. The high one has 9 bits: its product with a small integer is exact.
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# The end of the range of the rational approximation of tanh.
_TANH_RANGE = np.float32(7.90531110763549805)
# exp of this is just above the smallest normal number.
_LOWEST = np.float32(-87.0)


@inlined
def _exp32(x: Any) -> Any:
    """Return exp(x) for x <= 0: 2^n * exp(r) with |r| <= ln(2)/2 and a polynomial for exp(r)."""
    x = maximum(x, splat(_LOWEST))
    n = floor(fma(x, splat(_LOG2_E), splat(np.float32(0.5))))
    r = fma(n, splat(-_LN2_LOW), fma(n, splat(-_LN2_HIGH), x))
    # coefficients: Cephes' expf
    p = splat(np.float32(1.9875691500e-4))
    p = fma(p, r, splat(np.float32(1.3981999507e-3)))
    p = fma(p, r, splat(np.float32(8.3334519073e-3)))
    p = fma(p, r, splat(np.float32(4.1665795894e-2)))
    p = fma(p, r, splat(np.float32(1.6666665459e-1)))
    p = fma(p, r, splat(np.float32(5.0000001201e-1)))
    return (fma(p, r * r, r) + splat(np.float32(1.0))) * power_of_two(n)


@inlined
def _tanh32(x: Any) -> Any:
    """Return tanh(x) = x * p(x^2) / q(x^2) for |x| < 7.9, 1 - 2e-7 up to 9, then 1."""
    one = splat(np.float32(1.0))
    end = splat(_TANH_RANGE)
    far = splat(np.float32(9.0))
    # clamped by comparisons that are false for NaN, so that NaN stays
    y = select(
        at_least(x, end),
        end,
        select(at_least(splat(-_TANH_RANGE), x), splat(-_TANH_RANGE), x),
    )
    s = y * y
    # coefficients: Eigen's fast tanh
    p = splat(np.float32(-2.76076847742355e-16))
    p = fma(p, s, splat(np.float32(2.00018790482477e-13)))
    p = fma(p, s, splat(np.float32(-8.60467152213735e-11)))
    p = fma(p, s, splat(np.float32(5.12229709037114e-08)))
    p = fma(p, s, splat(np.float32(1.48572235717979e-05)))
    p = fma(p, s, splat(np.float32(6.37261928875436e-04)))
    p = fma(p, s, splat(np.float32(4.89352455891786e-03)))
    q = splat(np.float32(1.19825839466702e-06))
    q = fma(q, s, splat(np.float32(1.18534705686654e-04)))
    q = fma(q, s, splat(np.float32(2.26843463243900e-03)))
    q = fma(q, s, splat(np.float32(4.89352518554385e-03)))
    return select(
        at_least(x, far), one, select(at_least(one - one - far, x), one - one - one, p * y / q)
    )


# Numba compares the signatures of the next functions with those of their overloads, annotations
# included: so none here.
def exp_of_nonpositive(x):
    """Return exp(x) of a vector x <= 0."""
    raise NotImplementedError("only compiled code has vectors")


def tanh(x):
    """Return tanh(x) of a vector."""
    raise NotImplementedError("only compiled code has vectors")


@overload(
    exp_of_nonpositive,
    jit_options={"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True},
)
def _exp_by_type(x):
    if isinstance(x, Vector):
        return (lambda x: _exp32(x)) if x.element == types.float32 else (lambda x: exp_by_lanes(x))
    return None


@overload(
    tanh, jit_options={"forceinline": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
)
def _tanh_by_type(x):
    if isinstance(x, Vector):
        return (
            (lambda x: _tanh32(x)) if x.element == types.float32 else (lambda x: tanh_by_lanes(x))
        )
    return None


@inlined
def sigmoids(z: Any, one: Any) -> Any:
    """Return sigmoid(z) and sigmoid(-z), both without cancellation; `one` is a vector of ones."""
    zero = one - one
    e = exp_of_nonpositive(zero - absolute(z))
    high = one / (one + e)
    low = e * high
    positive = at_least(z, zero)
    return select(positive, high, low), select(positive, low, high)
