// The soft hash of rows x[token][m] alone: `hash_rows` and its gradient. Attention computes the
// hash inside its own kernels. A task is a segment of rows and a head; launched by
// racecore/ops/soft_hash/cuda.py.
#include "soft_hash/soft_hash.cuh"

__device__ inline void copy_rows(
    const Real* from, i64 first, i64 step, int n, int n_buckets, int padded_width, Real* to
) {
    for (int i = 0; i < TOKENS; ++i)
        for (int s = thread_id(); s < padded_width; s += THREADS)
            to[i * padded_width + s] = i < n && s < n_buckets ? from[first + i * step + s] : 0;
}

// out [N, M, S] = phi
extern "C" __global__ __launch_bounds__(THREADS, MANY_BLOCKS) void hash_rows(
    const Call call, Real* out
) {
    Scratch scratch = scratch_of(call);
    Hash hash = hash_of(call, scratch);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    i64 step = call.n_state_heads * hash.n_buckets;
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_state_heads;
         number += gridDim.x) {
        Task task = task_of(call, number, call.n_state_heads);
        use_head(hash, call, task.head);
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group group = query_group(task, t);
            hash_group(hash, rows_of(call.query, group, task.head, (int)call.head_dim), phi);
            for (int i = 0; i < group.n; ++i)
                for (int s = thread_id(); s < hash.n_buckets; s += THREADS)
                    out[(t + i) * step + task.head * hash.n_buckets + s] =
                        phi[i * hash.padded_buckets + s];
            __syncthreads();
        }
    }
}

extern "C" __global__ __launch_bounds__(THREADS, MANY_BLOCKS) void hash_rows_backward(
    const Call call, const Real* d_out, double* hash_parts
) {
    Scratch scratch = scratch_of(call);
    Hash hash = hash_of(call, scratch);
    HashSums sums = hash_sums(call, scratch);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    Real* d_phi = take_coefficients(scratch, hash.padded_buckets);
    i64 step = call.n_state_heads * hash.n_buckets;
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_state_heads;
         number += gridDim.x) {
        Task task = task_of(call, number, call.n_state_heads);
        use_head(hash, call, task.head);
        start_hash_sums(sums, hash_parts + number * call.hash_width);
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group group = query_group(task, t);
            Rows x = rows_of(call.query, group, task.head, (int)call.head_dim);
            hash_group(hash, x, phi);
            copy_rows(
                d_out, t * step + task.head * hash.n_buckets, step, group.n, hash.n_buckets,
                hash.padded_buckets, d_phi
            );
            __syncthreads();
            Rows d_x = rows_of(call.d_query, group, task.head, (int)call.head_dim);
            hash_group_backward(hash, phi, d_phi, x, d_x, false, sums);
            if (flushes(task, t)) {
                flush_hash_sums(sums, hash, (int)call.head_dim, is_first_flush(task, t));
                __syncthreads();
            }
        }
    }
}
