// The launch arguments that every attention kernel takes, and the mapping of blocks to segments
// and heads.
//
// `racecore/ops/cuda/call.py` builds the structure (`make_call`) and launches the kernels
// (`launch`). Block b takes the tasks b, b + gridDim.x, ...; one task is one segment of one head.
#pragma once

#include "cuda/warp.cuh"

// Every field has eight bytes: `make_call` writes the same structure, in the same order.
struct Call {
    Array query, key, value, out, d_out, d_query, d_key, d_value;
    // [n_segments, 5]: sequence, batch index, first token, end token, groups of tokens before it
    const i64* segments;
    const Real* planes;   // [M or 1, L*P, D], padded like a Matrix
    i64 planes_per_head;  // 0 or 1
    const Real* beta;     // [M]
    const unsigned char* mask;
    i64 mask_batch, mask_token;  // strides in bytes: one element is one byte
    // Scratch of all blocks if shared memory is too small, else null.
    Real* workspace;
    i64 scratch_numbers;  // of one block
    i64 n_segments, n_tables, n_planes, head_dim, value_dim, n_heads, n_kv_heads, n_state_heads;
    // Index among the state heads of one key/value head, for kernels over keys.
    i64 state_head;
    i64 bucket_mean;
    // Numbers in a row of hash gradients: L*P*D + 1, 1 if only beta's is wanted, 0 if none is.
    i64 hash_width;
};

__device__ inline int n_buckets(const Call& call) { return (int)(call.n_tables << call.n_planes); }
__device__ inline int padded_buckets(const Call& call) { return padded(n_buckets(call)); }
__device__ inline int padded_rows(const Call& call) {
    return padded((int)(call.n_tables * call.n_planes));
}
__device__ inline i64 state_width(const Call& call) {
    return n_buckets(call) * (1 + call.value_dim);
}

__device__ inline Scratch scratch_of(const Call& call) {
    if (call.workspace != nullptr)
        return Scratch{call.workspace + blockIdx.x * call.scratch_numbers};
    return Scratch{reinterpret_cast<Real*>(shared_memory)};
}

__device__ inline Real* take_coefficients(Scratch& scratch, int n_rows) {
    return scratch.take(TOKENS * n_rows);
}

__device__ inline Matrix take_matrix(Scratch& scratch, int n_rows, int n_columns) {
    int width = row_width(n_columns);
    return Matrix{scratch.take((i64)(n_rows - PAD) * width), n_rows, width};
}

// A task is a segment and a head; `head` counts query heads or key/value heads.
struct Task {
    i64 index, sequence, b, begin, end, groups_before;
    int head;
};

__device__ inline Task task_of(const Call& call, i64 task, i64 n_heads) {
    const i64* segment = call.segments + task / n_heads * 5;
    return Task{task / n_heads, segment[0], segment[1],           segment[2],
                segment[3],     segment[4], (int)(task % n_heads)};
}

__device__ inline Group query_group(const Task& task, i64 t) {
    int n = (int)(task.end - t < TOKENS ? task.end - t : TOKENS);
    return Group{task.b, t, n, (1u << n) - 1};
}

__device__ inline Group key_group(const Call& call, const Task& task, i64 t) {
    Group group = query_group(task, t);
    if (call.mask != nullptr)
        for (int i = 0; i < group.n; ++i)
            if (call.mask[task.b * call.mask_batch + (t + i) * call.mask_token] == 0)
                group.kept &= ~(1u << i);
    return group;
}

// Whether the float32 sums are added to float64 after the group at t.
__device__ inline bool flushes(const Task& task, i64 t) {
    return t + TOKENS >= task.end || (t + TOKENS - task.begin) % FLUSH == 0;
}

__device__ inline bool is_first_flush(const Task& task, i64 t) { return t - task.begin < FLUSH; }
