// The weights of a query's buckets, and sums over the tokens of a task.
#pragma once

#include "soft_hash/soft_hash.cuh"

constexpr double BUCKET_MEAN_EPS = 1e-6;
__device__ inline float smallest(float) { return 1.17549435e-38f; }
__device__ inline double smallest(double) { return 2.2250738585072014e-308; }

// How far it is from the masses of one token to those of the next: none where all tokens see the same.
struct Masses {
    const Real* data;
    int step, n_buckets, wide_buckets, n_tables;
    bool bucket_mean;
};

__device__ inline Masses masses_of(const Call& call, const Real* data, int step) {
    return Masses{data, step, n_buckets(call), wide_buckets(call), (int)call.n_tables, call.bucket_mean != 0};
}

__device__ inline Real bucket_factor(const Masses& masses, const Real* mass, int s) {
    return 1 / (masses.n_tables * (mass[s] + (Real)BUCKET_MEAN_EPS));
}

// The sum over the SHARE lanes of a token.
__device__ inline Real token_total(Real x) {
#pragma unroll
    for (int step = 1; step < SHARE; step *= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// rho[TOKENS][S] = phi * factor; return the factor of the lane's token where the readout has one for all its buckets.
//   ratio        factor = 1 / <phi, mass>, zero where the denominator is
//   bucket_mean  factor = 1 / (L (mass + eps))
__device__ inline Real weigh(const Masses& masses, const Real* phi, Real* rho) {
    int i = thread_id() / SHARE, first = i * masses.wide_buckets;
    const Real* mass = masses.data + i * masses.step;
    Real factor = 0;
    if (!masses.bucket_mean) {
        Real sum = 0;
        for (int s = thread_id() % SHARE; s < masses.n_buckets; s += SHARE) sum += phi[first + s] * mass[s];
        Real den = token_total(sum);
        factor = den < smallest(den) ? 0 : 1 / den;  // NaN is not less, and stays visible
    }
    for (int s = thread_id() % SHARE; s < masses.wide_buckets; s += SHARE) {
        bool is_real = s < masses.n_buckets;
        Real f = masses.bucket_mean && is_real ? bucket_factor(masses, mass, s) : factor;
        rho[first + s] = is_real ? phi[first + s] * f : 0;
    }
    return factor;
}

// Given h = d_rho, turn it into d_phi, and write d_mass [TOKENS][S], token by token.
__device__ inline void weigh_backward(
    const Masses& masses, const Real* phi, const Real* rho, Real factor, Real* h, Real* d_mass) {
    int i = thread_id() / SHARE, first = i * masses.wide_buckets;
    const Real* mass = masses.data + i * masses.step;
    Real d_den = 0;
    if (!masses.bucket_mean) {
        // factor = 1 / <phi, mass>
        Real sum = 0;
        for (int s = thread_id() % SHARE; s < masses.n_buckets; s += SHARE) sum += rho[first + s] * h[first + s];
        d_den = -token_total(sum) * factor;
    }
    for (int s = thread_id() % SHARE; s < masses.wide_buckets; s += SHARE) {
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

// What the tokens of a task add to a state: [S] masses and [S][V] value sums, S*(1+V) numbers in float64.
struct StateSums {
    Real* mass;
    Matrix values;
    double* target;
    int n_buckets, value_dim;
};

__device__ inline StateSums state_sums(const Call& call, Scratch& scratch) {
    StateSums sums;
    sums.mass = scratch.take(wide_buckets(call));
    sums.values = take_matrix(scratch, wide_buckets(call), (int)call.value_dim);
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
__device__ inline void add_group(const StateSums& sums, const Real* mass_terms, const Real* c, const Rows& x) {
    for (int s = thread_id(); s < sums.values.n_rows; s += THREADS)
        for (int i = 0; i < TOKENS; ++i) sums.mass[s] += mass_terms[i * sums.values.n_rows + s];
    accumulate(c, sums.values, x);
}

__device__ inline void flush_state_sums(const StateSums& sums, bool is_first) {
    for (int s = thread_id(); s < sums.n_buckets; s += THREADS) {
        sums.target[s] = is_first ? (double)sums.mass[s] : sums.target[s] + sums.mass[s];
        sums.mass[s] = 0;
    }
    flush_matrix(sums.values, sums.n_buckets, sums.value_dim, sums.target + sums.n_buckets, is_first);
}

// A state, or the gradient of one, rounded from float64 numbers [S*(1+V)].
struct State {
    double* mass;  // [S], advances in float64
    Matrix values;
};

__device__ inline State new_state(const Call& call, Scratch& scratch) {
    State state;
    state.mass = scratch.take_doubles(wide_buckets(call));
    state.values = take_matrix(scratch, wide_buckets(call), (int)call.value_dim);
    return state;
}

__device__ inline void load_state(const State& state, const Call& call, const double* from) {
    int buckets = n_buckets(call), width = (int)call.value_dim;
    for (int s = thread_id(); s < state.values.n_rows; s += THREADS) state.mass[s] = s < buckets ? from[s] : 0;
    for (int s = 0; s < state.values.n_rows - PAD; ++s)
        for (int d = thread_id(); d < state.values.width; d += THREADS)
            state.values.data[(i64)s * state.values.width + d] =
                s < buckets && d < width ? (Real)from[buckets + (i64)s * width + d] : 0;
}

// The masses of a state, of type Real.
__device__ inline void round_masses(const State& state, Real* masses) {
    for (int s = thread_id(); s < state.values.n_rows; s += THREADS) masses[s] = (Real)state.mass[s];
}
