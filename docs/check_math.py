"""Check every formula of docs/math.md by machine: `python docs/check_math.py` (one second, NumPy
only).

Nothing of racecore is imported. Gradients are held against complex-step derivatives, df/dx = Im f(x
+ i 1e-30) / 1e-30, which have no cancellation and so are exact to rounding. Every line printed is
the largest relative error of one claim.
"""

from __future__ import annotations

import numpy as np

EPS = 1e-6  # of the readout bucket_mean
rng = np.random.default_rng(7)
worst = 0.0


def claim(text: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Print the error of a formula and remember the worst."""
    global worst
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise SystemExit(f"{text}: shapes {found.shape} and {expected.shape}")
    error = float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-300))
    worst = max(worst, error)
    print(f"{error:8.1e}  {text}")


def complex_step(f, x: np.ndarray) -> np.ndarray:
    """Differentiate a real function of an array, one element at a time."""
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        shifted = x.astype(complex)
        shifted[index] += 1e-30j
        gradient[index] = f(shifted).imag / 1e-30
    return gradient


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def corners(n_planes: int) -> np.ndarray:
    bits = np.arange(2**n_planes)[:, None] >> np.arange(n_planes - 1, -1, -1) & 1
    return 2.0 * bits - 1


def soft_hash(x, planes, beta):
    """Return phi [T, L*R] by the definition: a softmax over corners. x [T, D], planes [L, P, D]."""
    logits = beta * np.tanh(np.einsum("td,lpd->tlp", x, planes)) @ corners(planes.shape[1]).T
    e = np.exp(logits)
    return (e / e.sum(-1, keepdims=True)).reshape(len(x), -1)


def weights(phi, mass, readout, n_tables):
    """Return rho and its factor: out = sum_s rho[s] value_sum[s]."""
    if readout == "ratio":
        factor = 1 / (phi * mass).sum(-1, keepdims=True)
    else:
        factor = 1 / (n_tables * (mass + EPS))
    return phi * factor, factor


def attend(q, k, v, planes, beta, mass0, value_sum0, readout, causal):
    """Return out [T, V] and the final state, straight from the definitions; rows see all keys or
    keys j <= i.
    """
    phi_q, phi_k = soft_hash(q, planes, beta), soft_hash(k, planes, beta)
    out = []
    for i in range(len(q)):
        seen = i + 1 if causal else len(k)
        mass = mass0 + phi_k[:seen].sum(0)
        value_sum = value_sum0 + np.einsum("ts,tv->sv", phi_k[:seen], v[:seen])
        out.append(weights(phi_q[i], mass, readout, len(planes))[0] @ value_sum)
    return np.stack(out), mass0 + phi_k.sum(0), value_sum0 + np.einsum("ts,tv->sv", phi_k, v)


def check_hash() -> None:
    """Sections 1 and 2: factorisation, mean corner, kernel, gradient."""
    n_planes, dim, beta = 4, 5, 1.7
    planes = rng.standard_normal((1, n_planes, dim))
    x, z = rng.standard_normal((2, 1, dim))
    c = corners(n_planes)
    phi, psi = soft_hash(x, planes, beta)[0], soft_hash(z, planes, beta)[0]
    y, w = beta * np.tanh(planes[0] @ x[0]), beta * np.tanh(planes[0] @ z[0])
    a, b = sigmoid(2 * y), sigmoid(2 * w)
    claim("phi = prod_p sigmoid(2 c_p y_p)", sigmoid(2 * c * y).prod(1), phi)
    claim("sum_r phi_r c_r = tanh(y) = 2 a - 1", phi @ c, np.tanh(y))
    claim(
        "phi(q).phi(k) = prod_p (a b + (1-a)(1-b))", (a * b + (1 - a) * (1 - b)).prod(), phi @ psi
    )
    claim(
        "              = prod_p (1 + tanh y tanh z) / 2",
        ((1 + np.tanh(y) * np.tanh(w)) / 2).prod(),
        phi @ psi,
    )

    d_phi = rng.standard_normal(2**n_planes)
    weighted = d_phi * phi
    d_y = weighted @ (c - np.tanh(y))
    s1, s0 = weighted @ (c > 0), weighted @ (c < 0)
    exact = complex_step(lambda t: d_phi @ np.prod(sigmoid(2 * c * t), axis=1), y)
    claim("d_y = sum_r d_phi phi (c - tanh y)", d_y, exact)
    claim("    = 2 (s1 (1 - a) - s0 a)", 2 * (s1 * (1 - a) - s0 * a), exact)
    folded, row = np.empty(n_planes), weighted.copy()
    for p in reversed(range(n_planes)):
        even, odd = row[0::2], row[1::2]
        folded[p] = 2 * (odd.sum() * (1 - a[p]) - even.sum() * a[p])
        row = even + odd
    claim("    by folding the last bit away", folded, exact)

    def loss(x, planes, beta):
        return d_phi @ soft_hash(x, planes, beta)[0]

    tanh_u = y / beta
    d_u = d_y * beta * (1 - tanh_u**2)
    claim(
        "d_beta = sum_p d_y tanh(u)",
        d_y @ tanh_u,
        complex_step(lambda t: loss(x, planes, t), np.array(beta)),
    )
    claim(
        "d_x = sum_p d_u W_p", d_u @ planes[0], complex_step(lambda t: loss(t, planes, beta), x)[0]
    )
    claim("d_W_p = d_u x", np.outer(d_u, x[0]), complex_step(lambda t: loss(x, t, beta), planes)[0])


def check_digits() -> None:
    """Section 9: a bucket's probability, and a sum over its bits, from tables of 16 entries per
    digit of four bits.
    """
    for n_planes in (4, 6, 8, 10):
        planes, q, tau = rng.standard_normal((1, n_planes, 5)), rng.standard_normal((1, 5)), 0.4
        u = planes[0] @ q[0]
        y = np.tanh(u) / (tau * 5**0.5)
        c, codes = corners(n_planes), np.arange(2**n_planes)
        e = np.exp(c @ y)
        product, total = np.ones(2**n_planes), np.zeros(2**n_planes)
        for first in range(0, n_planes, 4):
            bits = range(first, min(first + 4, n_planes))  # bit 0 is the last plane
            signs = 2 * (np.arange(16)[:, None] >> np.arange(len(bits)) & 1) - 1
            own = [n_planes - 1 - bit for bit in bits]
            digit = codes >> first & 15
            product *= sigmoid(2 * signs * y[own]).prod(1)[digit]
            total += (signs * u[own]).sum(1)[digit]
        claim(f"P = {n_planes}: phi_r = prod_n psi_n[digit n of r]", product, e / e.sum())
        claim(f"P = {n_planes}: sum_p c_p u_p = sum over digits", total, c @ u)


def check_kernel_form() -> None:
    """Section 4: the ratio readout is attention under the kernel, and out is a convex combination
    of values.
    """
    planes = rng.standard_normal((3, 2, 4))
    q, k, v = (rng.standard_normal((6, n)) for n in (4, 4, 3))
    similarity = soft_hash(q, planes, 1.3) @ soft_hash(k, planes, 1.3).T
    expected = similarity @ v / similarity.sum(1, keepdims=True)
    out, _, _ = attend(q, k, v, planes, 1.3, np.zeros(12), np.zeros((12, 3)), "ratio", False)
    claim("ratio = attention under sum_l phi.phi", out, expected)


def hash_backward(d_phi, x, planes, beta):
    """Section 3: gradients of x, planes and beta."""
    n_tables, n_planes, _ = planes.shape
    tanh_u = np.tanh(np.einsum("td,lpd->tlp", x, planes))
    weighted = (d_phi * soft_hash(x, planes, beta)).reshape(len(x), n_tables, -1)
    d_y = weighted @ corners(n_planes) - weighted.sum(-1, keepdims=True) * np.tanh(beta * tanh_u)
    d_u = d_y * beta * (1 - tanh_u**2)
    return (
        np.einsum("tlp,lpd->td", d_u, planes),
        np.einsum("tlp,td->lpd", d_u, x),
        (d_y * tanh_u).sum(),
    )


def blocked(q, k, v, planes, beta, mass0, value_sum0, readout, g, d_mass, d_value_sum, block):
    """Section 7: the causal algorithm of the CPU kernels, forward and backward, one block being one
    segment here.
    """
    n_tables, tril = len(planes), lambda x: np.tril(x)
    phi_q, phi_k = soft_hash(q, planes, beta), soft_hash(k, planes, beta)
    rows = [slice(i, min(i + block, len(q))) for i in range(0, len(q), block)]
    # pass 1 and scan: the state before every block
    states = [(mass0, value_sum0)]
    for r in rows:
        mass, value_sum = states[-1]
        states.append((mass + phi_k[r].sum(0), value_sum + phi_k[r].T @ v[r]))
    out, rho, d_mu, d_phi_q = (
        np.empty_like(g),
        np.empty_like(phi_q),
        np.empty_like(phi_q),
        np.empty_like(phi_q),
    )
    for r, (mass, value_sum) in zip(rows, states[:-1], strict=True):  # pass 2: any order
        mass_i = mass + np.cumsum(phi_k[r], axis=0)
        rho[r], factor = weights(phi_q[r], mass_i, readout, n_tables)
        out[r] = rho[r] @ value_sum + tril(rho[r] @ phi_k[r].T) @ v[r]
        h = g[r] @ value_sum.T + tril(g[r] @ v[r].T) @ phi_k[r]
        if readout == "ratio":
            c = -(rho[r] * h).sum(1, keepdims=True) * factor
            d_phi_q[r], d_mu[r] = h * factor + c * mass_i, c * phi_q[r]
        else:
            d_phi_q[r], d_mu[r] = h * factor, -rho[r] * h / (mass_i + EPS)
    # reverse scan: the gradient of the state after every block
    after = [(d_mass, d_value_sum)]
    for r in reversed(rows):
        after.append((after[-1][0] + d_mu[r].sum(0), after[-1][1] + rho[r].T @ g[r]))
    d_v, d_phi_k = np.empty_like(v), np.empty_like(phi_k)
    for r, (d_m, d_s) in zip(reversed(rows), after[:-1], strict=True):  # pass 3: any order
        d_v[r] = phi_k[r] @ d_s + tril(rho[r] @ phi_k[r].T).T @ g[r]
        suffix = np.cumsum(d_mu[r][::-1], axis=0)[::-1]
        d_phi_k[r] = d_m + suffix + v[r] @ d_s.T + tril(g[r] @ v[r].T).T @ rho[r]
    return out, d_phi_q, d_phi_k, d_v, *after[-1]


def bidirectional(q, k, v, planes, beta, mass0, value_sum0, readout, g, d_mass, d_value_sum):
    """Sections 4 and 5: one state for all queries; d_mass, d_value_sum is the gradient of the final
    state.
    """
    phi_q, phi_k = soft_hash(q, planes, beta), soft_hash(k, planes, beta)
    mass, value_sum = mass0 + phi_k.sum(0), value_sum0 + phi_k.T @ v
    if readout == "ratio":
        den = phi_q @ mass
        out = phi_q @ value_sum / den[:, None]
        r, c = g / den[:, None], -(g * out).sum(1, keepdims=True) / den[:, None]
        d_phi_q = r @ value_sum.T + c * mass
        d_value_sum, d_mass = d_value_sum + phi_q.T @ r, d_mass + (c * phi_q).sum(0)
        rho = phi_q / den[:, None]
        h = g @ value_sum.T
        claim("<g, out> = sum_s rho h, so out is not needed", (rho * h).sum(1), (g * out).sum(1))
    else:
        g = g / len(planes)
        m = 1 / (mass + EPS)
        h = g @ value_sum.T
        out = phi_q * m @ value_sum / len(planes)
        d_phi_q = h * m
        d_value_sum, d_mass = d_value_sum + (phi_q * m).T @ g, d_mass - (phi_q * h).sum(0) * m**2
    d_phi_k = d_mass + v @ d_value_sum.T
    return out, d_phi_q, d_phi_k, phi_k @ d_value_sum, d_mass, d_value_sum


def check_attention(readout: str, causal: bool) -> None:
    """Sections 4 to 7: the value and every gradient, an initial state and a used final state
    included.
    """
    n_tables, n_planes, dim, value_dim, n_tokens = 3, 2, 4, 3, 11
    n_buckets = n_tables * 2**n_planes
    planes, beta = rng.standard_normal((n_tables, n_planes, dim)), np.array(1.4)
    q, k, v = (rng.standard_normal((n_tokens, n)) for n in (dim, dim, value_dim))
    mass0, value_sum0 = rng.random(n_buckets), rng.standard_normal((n_buckets, value_dim))
    g = rng.standard_normal((n_tokens, value_dim))
    d_mass, d_value_sum = (
        rng.standard_normal(n_buckets),
        rng.standard_normal((n_buckets, value_dim)),
    )
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "planes": planes,
        "beta": beta,
        "mass0": mass0,
        "value_sum0": value_sum0,
    }

    def loss(**changed):
        out, mass, value_sum = attend(**{**arguments, **changed}, readout=readout, causal=causal)
        return (out * g).sum() + (mass * d_mass).sum() + (value_sum * d_value_sum).sum()

    what = f"{readout}, {'causal' if causal else 'bidirectional'}"
    values = (*arguments.values(), readout, g, d_mass, d_value_sum)
    results = blocked(*values, block=4) if causal else bidirectional(*values)
    out, d_phi_q, d_phi_k, d_v, d_mass0, d_value_sum0 = results
    claim(f"{what}: out", out, attend(**arguments, readout=readout, causal=causal)[0])
    d_q, d_planes_q, d_beta_q = hash_backward(d_phi_q, q, planes, beta)
    d_k, d_planes_k, d_beta_k = hash_backward(d_phi_k, k, planes, beta)
    found = {
        "q": d_q,
        "k": d_k,
        "v": d_v,
        "planes": d_planes_q + d_planes_k,
        "beta": d_beta_q + d_beta_k,
        "mass0": d_mass0,
        "value_sum0": d_value_sum0,
    }
    for name, gradient in found.items():
        step = complex_step(lambda x, name=name: loss(**{name: x}), arguments[name])
        claim(f"{what}: d_{name}", gradient, step)


def check_constant_values() -> None:
    """Section 6: constant values come back, and queries and keys then have no gradient."""
    planes = rng.standard_normal((3, 2, 4))
    q, k = rng.standard_normal((2, 9, 4))
    v, g = np.ones((9, 3)) * [1.0, -2.0, 0.5], rng.standard_normal((9, 3))
    zero = (np.zeros(12), np.zeros((12, 3)))
    out, d_phi_q, d_phi_k, *_ = blocked(q, k, v, planes, 1.4, *zero, "ratio", g, *zero, block=4)
    claim("V constant: out = V", out, v)
    claim("V constant: 1 + d_phi_q = 1", 1 + d_phi_q, np.ones_like(d_phi_q))
    claim("V constant: 1 + d_phi_k = 1", 1 + d_phi_k, np.ones_like(d_phi_k))


if __name__ == "__main__":
    check_hash()
    check_digits()
    check_kernel_form()
    for readout in ("ratio", "bucket_mean"):
        for causal in (False, True):
            check_attention(readout, causal)
    check_constant_values()
    print(f"worst relative error: {worst:.1e}")
    if worst > 1e-12:
        raise SystemExit("a formula is wrong")
