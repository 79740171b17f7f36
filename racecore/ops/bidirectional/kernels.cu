// Bidirectional attention: `sum_keys` adds up the keys and values of each segment, `read_out`
// computes the outputs of queries from a state, and the backward kernels their gradients. The
// specification is reference.py beside this file; cuda.py launches the kernels.
//
// A task is a segment and a head; a block takes one task after another. Each task writes its sums
// to a row of its own, and ops/cuda/sums.cu adds the rows in order: no floating-point atomics.
#include "cuda/readout.cuh"

// sums[segment][m] = masses and value sums of the keys of the segment
extern "C" __global__ __launch_bounds__(THREADS, MANY_BLOCKS) void sum_keys(
    const Call call, double* sums
) {
    Scratch scratch = scratch_of(call);
    StateSums state = state_sums(call, scratch);
    Hash hash = hash_of(call, scratch);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_state_heads;
         number += gridDim.x) {
        Task task = task_of(call, number, call.n_state_heads);
        int g = (int)(task.head / (call.n_state_heads / call.n_kv_heads));
        use_head(hash, call, task.head);
        start_state_sums(state, sums + number * state_width(call));
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group group = key_group(call, task, t);
            hash_group(hash, rows_of(call.key, group, g, (int)call.head_dim), phi);
            add_group(state, phi, phi, rows_of(call.value, group, g, (int)call.value_dim));
            __syncthreads();
            if (flushes(task, t)) flush_state_sums(state, is_first_flush(task, t));
        }
    }
}

// Gradients of keys and values from d_states[sequence][m], the gradient of the state that they
// were added to.
extern "C" __global__ __launch_bounds__(THREADS, FEW_BLOCKS) void sum_keys_backward(
    const Call call, const double* d_states, double* hash_parts
) {
    Scratch scratch = scratch_of(call);
    State d_state = new_state(call, scratch);
    Hash hash = hash_of(call, scratch);
    HashSums hash_total = hash_sums(call, scratch);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    Real* d_phi = take_coefficients(scratch, hash.padded_buckets);
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_kv_heads; number += gridDim.x) {
        Task task = task_of(call, number, call.n_kv_heads);
        int g = task.head;
        int m = (int)(g * (call.n_state_heads / call.n_kv_heads) + call.state_head);
        use_head(hash, call, m);
        load_state(
            d_state, call, d_states + (task.sequence * call.n_state_heads + m) * state_width(call)
        );
        start_hash_sums(
            hash_total, hash_parts + (task.index * call.n_state_heads + m) * call.hash_width
        );
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group group = key_group(call, task, t);
            Rows k = rows_of(call.key, group, g, (int)call.head_dim);
            hash_group(hash, k, phi);
            // value_sum += phi * v. d_v is written last because it may overwrite v.
            project(d_state.values, rows_of(call.value, group, g, (int)call.value_dim), d_phi);
            sync_projection();
            if (call.d_value.data != nullptr)
                expand(
                    phi, d_state.values, rows_of(call.d_value, group, g, (int)call.value_dim),
                    call.state_head > 0
                );
            __syncthreads();
            // mass += phi
            for (int j = thread_id(); j < TOKENS * hash.padded_buckets; j += THREADS)
                d_phi[j] += (Real)d_state.mass[j % hash.padded_buckets];
            __syncthreads();
            Rows d_k = rows_of(call.d_key, group, g, (int)call.head_dim);
            hash_group_backward(hash, phi, d_phi, k, d_k, call.state_head > 0, hash_total);
            if (flushes(task, t))
                flush_hash_sums(hash_total, hash, (int)call.head_dim, is_first_flush(task, t));
        }
    }
}

// Outputs of queries from states[sequence][m].
extern "C" __global__ __launch_bounds__(THREADS, MANY_BLOCKS) void read_out(
    const Call call, const double* states
) {
    Scratch scratch = scratch_of(call);
    State state = new_state(call, scratch);
    Hash hash = hash_of(call, scratch);
    Real* mass = scratch.take(hash.padded_buckets);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    Real* rho = take_coefficients(scratch, hash.padded_buckets);
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_heads; number += gridDim.x) {
        Task task = task_of(call, number, call.n_heads);
        int m = (int)(task.head / (call.n_heads / call.n_state_heads));
        use_head(hash, call, m);
        load_state(
            state, call, states + (task.sequence * call.n_state_heads + m) * state_width(call)
        );
        round_masses(state, mass);
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group group = query_group(task, t);
            hash_group(hash, rows_of(call.query, group, task.head, (int)call.head_dim), phi);
            weigh(masses_of(call, mass, 0), phi, rho);
            __syncthreads();
            expand(
                rho, state.values, rows_of(call.out, group, task.head, (int)call.value_dim), false
            );
            __syncthreads();
        }
    }
}

// Gradients of queries, and the part of each segment in the gradient of the state,
// d_sums[segment][query head].
extern "C" __global__ __launch_bounds__(THREADS, FEW_BLOCKS) void read_out_backward(
    const Call call, const double* states, double* d_sums, double* hash_parts
) {
    Scratch scratch = scratch_of(call);
    State state = new_state(call, scratch);
    StateSums d_state = state_sums(call, scratch);
    Hash hash = hash_of(call, scratch);
    HashSums hash_total = hash_sums(call, scratch);
    Real* mass = scratch.take(hash.padded_buckets);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    Real* rho = take_coefficients(scratch, hash.padded_buckets);
    Real* d_phi = take_coefficients(scratch, hash.padded_buckets);
    Real* d_mass = take_coefficients(scratch, hash.padded_buckets);
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_heads; number += gridDim.x) {
        Task task = task_of(call, number, call.n_heads);
        int m = (int)(task.head / (call.n_heads / call.n_state_heads));
        use_head(hash, call, m);
        load_state(
            state, call, states + (task.sequence * call.n_state_heads + m) * state_width(call)
        );
        start_state_sums(d_state, d_sums + number * state_width(call));
        start_hash_sums(hash_total, hash_parts + number * call.hash_width);
        round_masses(state, mass);
        Masses masses = masses_of(call, mass, 0);
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group group = query_group(task, t);
            Rows q = rows_of(call.query, group, task.head, (int)call.head_dim);
            Rows g = rows_of(call.d_out, group, task.head, (int)call.value_dim);
            hash_group(hash, q, phi);
            Real factor = weigh(masses, phi, rho);
            // out = rho @ value_sum
            project(state.values, g, d_phi);
            sync_projection();
            // rho = weigh(phi, mass)
            weigh_backward(masses, phi, rho, factor, d_phi, d_mass);
            __syncthreads();
            add_group(d_state, d_mass, rho, g);
            // phi = hash(q)
            Rows d_q = rows_of(call.d_query, group, task.head, (int)call.head_dim);
            hash_group_backward(hash, phi, d_phi, q, d_q, false, hash_total);
            if (flushes(task, t)) {
                flush_state_sums(d_state, is_first_flush(task, t));
                flush_hash_sums(hash_total, hash, (int)call.head_dim, is_first_flush(task, t));
            }
        }
    }
}
