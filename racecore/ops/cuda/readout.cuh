// Bucket weights of a query, their gradients, and the state of a task: loaded, summed, flushed.
#pragma once

#include "soft_hash/soft_hash.cuh"

constexpr double BUCKET_MEAN_EPS = 1e-6;
__device__ inline float smallest(float) { return 1.17549435e-38f; }
__device__ inline double smallest(double) { return 2.2250738585072014e-308; }

// The masses that queries read. `step` is the stride from token to token, 0 if all see the same.
struct Masses {
    const Real* data;
    int step, n_buckets, padded_buckets, n_tables;
    bool bucket_mean;
};

__device__ inline Masses masses_of(const Call& call, const Real* data, int step) {
    return Masses{data,
                  step,
                  n_buckets(call),
                  padded_buckets(call),
                  (int)call.n_tables,
                  call.bucket_mean != 0};
}

__device__ inline Real bucket_factor(const Masses& masses, const Real* mass, int s) {
    return 1 / (masses.n_tables * (mass[s] + (Real)BUCKET_MEAN_EPS));
}

// Return the sum over the TOKEN_THREADS lanes of a token.
__device__ inline Real token_total(Real x) {
#pragma unroll
    for (int step = 1; step < TOKEN_THREADS; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// rho[TOKENS][S] = phi * factor, with
//   ratio        factor = 1 / <phi, mass>, or 0 where the denominator is 0
//   bucket_mean  factor = 1 / (L (mass + eps))
// Return the factor of the thread's token; for bucket_mean, which has one per bucket, 0.
__device__ inline Real weigh(const Masses& masses, const Real* phi, Real* rho) {
    int i = thread_id() / TOKEN_THREADS, first = i * masses.padded_buckets;
    const Real* mass = masses.data + i * masses.step;
    Real factor = 0;
    if (!masses.bucket_mean) {
        Real sum = 0;
        for (int s = thread_id() % TOKEN_THREADS; s < masses.n_buckets; s += TOKEN_THREADS)
            sum += phi[first + s] * mass[s];
        Real den = token_total(sum);
        factor = den < smallest(den) ? 0 : 1 / den;  // NaN compares false and stays visible
    }
    for (int s = thread_id() % TOKEN_THREADS; s < masses.padded_buckets; s += TOKEN_THREADS) {
        bool is_real = s < masses.n_buckets;
        Real f = masses.bucket_mean && is_real ? bucket_factor(masses, mass, s) : factor;
        rho[first + s] = is_real ? phi[first + s] * f : 0;
    }
    return factor;
}

// h [TOKENS][S] holds d_rho and becomes d_phi; d_mass [TOKENS][S] is the term of each token.
__device__ inline void weigh_backward(
    const Masses& masses, const Real* phi, const Real* rho, Real factor, Real* h, Real* d_mass
) {
    int i = thread_id() / TOKEN_THREADS, first = i * masses.padded_buckets;
    const Real* mass = masses.data + i * masses.step;
    Real d_den = 0;
    if (!masses.bucket_mean) {
        // factor = 1 / <phi, mass>
        Real sum = 0;
        for (int s = thread_id() % TOKEN_THREADS; s < masses.n_buckets; s += TOKEN_THREADS)
            sum += rho[first + s] * h[first + s];
        d_den = -token_total(sum) * factor;
    }
    for (int s = thread_id() % TOKEN_THREADS; s < masses.padded_buckets; s += TOKEN_THREADS) {
        int j = first + s;
        if (s >= masses.n_buckets) {
            h[j] = d_mass[j] = 0;
        } else if (masses.bucket_mean) {
            // factor = 1 / (L (mass + eps))
            Real f = bucket_factor(masses, mass, s);
            d_mass[j] = -rho[j] * h[j] * f * masses.n_tables;
            h[j] *= f;
        } else {
            d_mass[j] = d_den * phi[j];
            h[j] = h[j] * factor + d_den * mass[s];
        }
    }
}

// Sums of a task for a state: [S] masses and [S][V] value sums; the target has S*(1+V) float64.
struct StateSums {
    Real* mass;
    Matrix values;
    double* target;
    int n_buckets, value_dim;
};

__device__ inline StateSums state_sums(const Call& call, Scratch& scratch) {
    StateSums sums;
    sums.mass = scratch.take(padded_buckets(call));
    sums.values = take_matrix(scratch, padded_buckets(call), (int)call.value_dim);
    sums.n_buckets = n_buckets(call);
    sums.value_dim = (int)call.value_dim;
    return sums;
}

__device__ inline void start_state_sums(StateSums& sums, double* target) {
    sums.target = target;
    clear(sums.mass, sums.values.n_rows);
    clear_matrix(sums.values);
}

// mass += sum over tokens of mass_terms[token]; values += sum over tokens of c[token] x token of x
__device__ inline void add_group(
    const StateSums& sums, const Real* mass_terms, const Real* c, const Rows& x
) {
    for (int s = thread_id(); s < sums.values.n_rows; s += THREADS)
        for (int i = 0; i < TOKENS; ++i) sums.mass[s] += mass_terms[i * sums.values.n_rows + s];
    accumulate(c, sums.values, x);
}

__device__ inline void flush_state_sums(const StateSums& sums, bool is_first) {
    for (int s = thread_id(); s < sums.n_buckets; s += THREADS) {
        sums.target[s] = is_first ? (double)sums.mass[s] : sums.target[s] + sums.mass[s];
        sums.mass[s] = 0;
    }
    flush_matrix(
        sums.values, sums.n_buckets, sums.value_dim, sums.target + sums.n_buckets, is_first
    );
}

// A state or the gradient of one, rounded from S*(1+V) float64 numbers.
struct State {
    double* mass;  // [S], accumulated in float64
    Matrix values;
};

__device__ inline State new_state(const Call& call, Scratch& scratch) {
    State state;
    state.mass = scratch.take_doubles(padded_buckets(call));
    state.values = take_matrix(scratch, padded_buckets(call), (int)call.value_dim);
    return state;
}

__device__ inline void load_state(const State& state, const Call& call, const double* from) {
    int buckets = n_buckets(call), width = (int)call.value_dim;
    for (int s = thread_id(); s < state.values.n_rows; s += THREADS)
        state.mass[s] = s < buckets ? from[s] : 0;
    for (int s = 0; s < state.values.n_rows - PAD; ++s)
        for (int d = thread_id(); d < state.values.width; d += THREADS)
            state.values.data[(i64)s * state.values.width + d] =
                s < buckets && d < width ? (Real)from[buckets + (i64)s * width + d] : 0;
}

// masses [S] = the masses of a state, rounded to Real.
__device__ inline void round_masses(const State& state, Real* masses) {
    for (int s = thread_id(); s < state.values.n_rows; s += THREADS)
        masses[s] = (Real)state.mass[s];
}
