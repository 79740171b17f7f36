// What every kernel is told, and how its blocks find their work.
#pragma once

#include "cuda/warp.cuh"

// Eight bytes each: racecore.ops.cuda_call builds the same structure.
struct Call {
    Array query, key, value, out, d_out, d_query, d_key, d_value;
    const i64* segments;  // [n, 5]: sequence, batch index, first token, token after the last, groups before it
    const Real* planes;   // [M or 1, L*P, D], padded as a Matrix
    i64 planes_per_head;  // 0 or 1
    const Real* beta;     // [M]
    const unsigned char* mask;
    i64 mask_batch, mask_token;  // strides
    Real* workspace;             // scratch of all blocks where shared memory is too small, else null
    i64 scratch_numbers;         // of a block
    i64 n_segments, n_tables, n_planes, head_dim, value_dim, n_heads, n_kv_heads, n_state_heads;
    i64 share;  // which of the state heads of a key/value head, in kernels that go over keys
    i64 bucket_mean;
    i64 hash_width;  // of a row of gradients of the hash: L*P*D + 1; 1 for that of beta alone; 0 for none
};

__device__ inline int n_buckets(const Call& call) { return (int)(call.n_tables << call.n_planes); }
__device__ inline int wide_buckets(const Call& call) { return wide(n_buckets(call)); }
__device__ inline int wide_rows(const Call& call) { return wide((int)(call.n_tables * call.n_planes)); }
__device__ inline i64 state_width(const Call& call) { return n_buckets(call) * (1 + call.value_dim); }

__device__ inline Scratch scratch_of(const Call& call) {
    if (call.workspace != nullptr) return Scratch{call.workspace + blockIdx.x * call.scratch_numbers};
    return Scratch{reinterpret_cast<Real*>(shared_memory)};
}

__device__ inline Real* take_coefficients(Scratch& scratch, int n_rows) { return scratch.take(TOKENS * n_rows); }

__device__ inline Matrix take_matrix(Scratch& scratch, int n_rows, int n_columns) {
    int width = row_width(n_columns);
    return Matrix{scratch.take((i64)(n_rows - PAD) * width), n_rows, width};
}

// A task is a segment and a head: `head` counts query heads, or key/value heads.
struct Task {
    i64 index, sequence, b, begin, end, groups_before;
    int head;
};

__device__ inline Task task_of(const Call& call, i64 task, i64 n_heads) {
    const i64* segment = call.segments + task / n_heads * 5;
    return Task{task / n_heads, segment[0], segment[1], segment[2], segment[3], segment[4], (int)(task % n_heads)};
}

__device__ inline Group query_group(const Task& task, i64 t) {
    int n = (int)(task.end - t < TOKENS ? task.end - t : TOKENS);
    return Group{task.b, t, n, (1u << n) - 1};
}

__device__ inline Group key_group(const Call& call, const Task& task, i64 t) {
    Group group = query_group(task, t);
    if (call.mask != nullptr)
        for (int i = 0; i < group.n; ++i)
            if (call.mask[task.b * call.mask_batch + (t + i) * call.mask_token] == 0) group.kept &= ~(1u << i);
    return group;
}

// Whether the group at t is the last one before sums move on to float64.
__device__ inline bool flushes(const Task& task, i64 t) {
    return t + TOKENS >= task.end || (t + TOKENS - task.begin) % FLUSH == 0;
}

__device__ inline bool is_first_flush(const Task& task, i64 t) { return t - task.begin < FLUSH; }
