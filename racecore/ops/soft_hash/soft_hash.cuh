// The soft hash of a group of tokens and its gradient:
//   phi[r] = prod_p sigmoid(2 beta c_r[p] tanh(u_p)),  u_p = <W_p, x>,  c_r[p] = +1 or -1
#pragma once

#include "cuda/call.cuh"

struct Hash {
    Matrix planes;  // [L*P, D]
    Real beta;
    int n_tables, n_planes, n_buckets, padded_buckets;
    // [TOKENS][planes.n_rows]: projections; probabilities of the sides c = +1 (up) and c = -1
    // (down).
    Real *u, *up, *down;
};

__device__ inline Hash hash_of(const Call& call, Scratch& scratch) {
    int rows = padded_rows(call);
    Hash hash;
    hash.planes = Matrix{nullptr, rows, row_width((int)call.head_dim)};
    hash.beta = 0;
    hash.n_tables = (int)call.n_tables;
    hash.n_planes = (int)call.n_planes;
    hash.n_buckets = n_buckets(call);
    hash.padded_buckets = padded_buckets(call);
    hash.u = take_coefficients(scratch, rows);
    hash.up = take_coefficients(scratch, rows);
    hash.down = take_coefficients(scratch, rows);
    return hash;
}

__device__ inline void use_head(Hash& hash, const Call& call, int m) {
    i64 size = (i64)(hash.planes.n_rows - PAD) * hash.planes.width;
    hash.planes.data = const_cast<Real*>(call.planes) + (call.planes_per_head ? m * size : 0);
    hash.beta = call.beta[m];
}

// up, down = sigmoid(+-2 beta tanh(u)), both to full relative precision
__device__ inline void activate(const Hash& hash) {
    for (int j = thread_id(); j < TOKENS * hash.planes.n_rows; j += THREADS) {
        Real z = 2 * hash.beta * tangent(hash.u[j]);
        Real e = power_of_e(-magnitude(z)), large = 1 / (1 + e);
        hash.up[j] = z < 0 ? e * large : large;
        hash.down[j] = z < 0 ? large : e * large;
    }
}

// phi[token][bucket]: the product over planes; zero for masked tokens
__device__ inline void multiply(const Hash& hash, unsigned kept, Real* phi) {
    int i = thread_id() / TOKEN_THREADS, corners = 1 << hash.n_planes;
    const Real* up = hash.up + i * hash.planes.n_rows;
    const Real* down = hash.down + i * hash.planes.n_rows;
    for (int s = thread_id() % TOKEN_THREADS; s < hash.padded_buckets; s += TOKEN_THREADS) {
        Real product = s < hash.n_buckets && (kept >> i & 1) ? 1 : 0;
        if (product != 0) {
            int first = (s >> hash.n_planes) * hash.n_planes, corner = s & (corners - 1);
            for (int p = 0; p < hash.n_planes; ++p)  // plane 0 is the most significant bit
                product *= corner >> (hash.n_planes - 1 - p) & 1 ? up[first + p] : down[first + p];
        }
        phi[i * hash.padded_buckets + s] = product;
    }
}

// phi from u. The caller has passed a barrier since u was written, and must pass one before
// reading phi.
__device__ inline void hash_projected(const Hash& hash, unsigned kept, Real* phi) {
    activate(hash);
    __syncthreads();
    multiply(hash, kept, phi);
}

// phi[TOKENS][S] of the rows x; ends with a barrier.
__device__ inline void hash_group(const Hash& hash, const Rows& x, Real* phi) {
    project(hash.planes, x, hash.u);
    __syncthreads();
    hash_projected(hash, x.group.kept, phi);
    __syncthreads();
}

// Replace u by its gradient, given d_phi [TOKENS][S]. Return the thread's part of d_beta.
__device__ inline double hash_backward(const Hash& hash, const Real* phi, const Real* d_phi) {
    int i = thread_id() / TOKEN_THREADS, corners = 1 << hash.n_planes;
    const Real *f = phi + i * hash.padded_buckets, *d_f = d_phi + i * hash.padded_buckets;
    double d_beta = 0;
    for (int row = thread_id() % TOKEN_THREADS; row < hash.planes.n_rows; row += TOKEN_THREADS) {
        int j = i * hash.planes.n_rows + row;
        int table = row / hash.n_planes;
        int p = row % hash.n_planes;
        if (table >= hash.n_tables) {
            hash.u[j] = 0;
            continue;
        }
        // phi = prod_p (c = +1 ? up_p : down_p)
        // d log(up) / dy = 2 down,  d log(down) / dy = -2 up,  y = beta tanh(u)
        Real plus = 0, minus = 0;
        for (int r = 0; r < corners; ++r) {
            Real w = f[(table << hash.n_planes) + r] * d_f[(table << hash.n_planes) + r];
            if (r >> (hash.n_planes - 1 - p) & 1)
                plus += w;
            else
                minus += w;
        }
        Real d_y = 2 * (hash.down[j] * plus - hash.up[j] * minus);
        // y = beta tanh(u);  d tanh(u) / du = 4 e / (1 + e)^2 with e = exp(-2 |u|), which keeps
        // its relative precision where tanh saturates
        Real u = hash.u[j];
        Real e = power_of_e(-2 * magnitude(u));
        Real slope = 4 * e / ((1 + e) * (1 + e));
        d_beta += (double)(d_y * tangent(u));
        hash.u[j] = d_y * hash.beta * slope;
    }
    return d_beta;
}

// Gradients of planes and beta, summed over the groups of a task.
struct HashSums {
    Matrix planes;       // [L*P, D], absent if only d_beta is wanted
    double beta;         // the part of this thread
    double* warp_betas;  // [WARPS], the sums of the warps
    double* target;
    i64 width;
};

__device__ inline HashSums hash_sums(const Call& call, Scratch& scratch) {
    HashSums sums = {};
    sums.width = call.hash_width;
    if constexpr (WARPS > 1) sums.warp_betas = scratch.take_doubles(WARPS);
    if (call.hash_width > 1)
        sums.planes = take_matrix(scratch, padded_rows(call), (int)call.head_dim);
    return sums;
}

__device__ inline void start_hash_sums(HashSums& sums, double* target) {
    sums.beta = 0;
    sums.target = target;
    if (sums.width > 1) clear_matrix(sums.planes);
}

// From d_phi to d_x and the hash sums. The caller has passed a barrier since d_phi was written;
// ends with a barrier.
__device__ inline void hash_group_backward(
    const Hash& hash, const Real* phi, const Real* d_phi, const Rows& x, const Rows& d_x, bool adds,
    HashSums& sums
) {
    // phi = hash(u)
    sums.beta += hash_backward(hash, phi, d_phi);
    __syncthreads();
    // u = planes @ x. d_x is written last because it may overwrite x.
    if (sums.width > 1) accumulate(hash.u, sums.planes, x);
    if (d_x.array->data != nullptr) expand(hash.u, hash.planes, d_x, adds);
    __syncthreads();
}

__device__ inline void flush_hash_sums(
    HashSums& sums, const Hash& hash, int head_dim, bool is_first
) {
    if (sums.width == 0) return;
    if (sums.width > 1)
        flush_matrix(sums.planes, hash.n_tables * hash.n_planes, head_dim, sums.target, is_first);
    for (int step = LANES / 2; step > 0; step /= 2)
        sums.beta += __shfl_xor_sync(~0u, sums.beta, step);
    if constexpr (WARPS > 1) {
        if (lane_id() == 0) sums.warp_betas[warp_id()] = sums.beta;
        __syncthreads();
        for (int warp = 1; warp < WARPS; ++warp) sums.beta += sums.warp_betas[warp];
    }
    double* total = sums.target + sums.width - 1;
    if (thread_id() == 0) *total = is_first ? sums.beta : *total + sums.beta;
    sums.beta = 0;
}
