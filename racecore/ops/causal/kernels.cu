// Causal attention by segments: each segment starts from the state before it. `causal_scan`
// computes the outputs; backward, `causal_scan_queries_backward` runs forward in time for the
// queries and `causal_scan_keys_backward` backward in time for keys and values. The specification
// is reference.py beside this file; cuda.py launches the kernels.
//
// A task is a segment and a head, a block takes one task after another. ROWS buckets of the state
// are in registers while the tokens of a group pass: each token is added to the state and then
// reads it. With tensor cores a whole group is computed at once (tensor_scan.cuh). The sums over
// the keys of each segment come from bidirectional/kernels.cu, and ops/cuda/sums.cu turns them
// into states. Nothing is subtracted, so nothing cancels.
#include "cuda/readout.cuh"

// masses[TOKENS][S]: inclusive prefix sums; `mass` advances by the group.
__device__ inline void prefix_mass(
    const Real* phi, int padded_buckets, double* mass, Real* masses
) {
    for (int s = thread_id(); s < padded_buckets; s += THREADS) {
        Real before = (Real)mass[s], sum = 0;
        for (int i = 0; i < TOKENS; ++i) {
            sum += phi[i * padded_buckets + s];
            masses[i * padded_buckets + s] = before + sum;
        }
        mass[s] += sum;
    }
}

// Saved by the scan for queries for the scan for keys: u of the keys, by state head, and rho and
// d_mass, by query head.
struct Stash {
    Real *u, *rho, *d_mass;
};

__device__ inline Stash stash_of(
    const Call& call, Real* stash, const Task& task, i64 t, i64 query_head, i64 state_head
) {
    i64 group = task.groups_before + (t - task.begin) / TOKENS;
    i64 rows = TOKENS * padded_rows(call);
    i64 buckets = TOKENS * padded_buckets(call);
    Real* first = stash + group * (call.n_state_heads * rows + 2 * call.n_heads * buckets);
    Real* rho = first + call.n_state_heads * rows + 2 * query_head * buckets;
    return Stash{first + state_head * rows, rho, rho + buckets};
}

#if TENSOR_CORES
#include "causal/tensor_scan.cuh"
#else

// token i of out = sum over buckets of rho[i] * (state after tokens 0 ... i). The state advances
// by the group.
__device__ inline void scan_rows(
    const Matrix& state, const Real* phi, const Rows& v, const Real* rho, const Rows& out
) {
    for (int slab = 0; slab < v.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real values[TOKENS][COLUMNS], sums[TOKENS][COLUMNS] = {};
        load_rows(v, column, values);
        for (int row = 0; row < state.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS];
            load_tile(state, row, column, a);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                Four added = coefficients(phi, state.n_rows, i, row);
                Four read = coefficients(rho, state.n_rows, i, row);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    add_multiple(added.x[r], values[i], a[r]);
                    add_multiple(read.x[r], a[r], sums[i]);
                }
            }
            store_tile(state, row, column, a);
        }
        store_rows(out, column, sums, false);
    }
}

// h[i] = <state after tokens 0 ... i, g[i]> for each bucket. The state advances by the group.
__device__ inline void scan_weights(
    const Matrix& state, const Real* phi, const Rows& v, const Rows& g, Real* h
) {
    for (int slab = 0; slab < v.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real values[TOKENS][COLUMNS], gradients[TOKENS][COLUMNS];
        load_rows(v, column, values);
        load_rows(g, column, gradients);
        for (int row = 0; row < state.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS], sums[LANES];
            load_tile(state, row, column, a);
#pragma unroll
            for (int i = 0; i < TOKENS; ++i) {
                Four added = coefficients(phi, state.n_rows, i, row);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    add_multiple(added.x[r], values[i], a[r]);
                    sums[i * ROWS + r] = dot(a[r], gradients[i]);
                }
            }
            store_tile(state, row, column, a);
            add_lane_total(lane_total(sums), h, state.n_rows, row, slab == 0);
        }
    }
}

// From the last token to the first: d_state += rho * g of the token's queries, then d_v = phi *
// d_state and d_phi += <d_state, v>.
__device__ inline void scan_rows_backward(
    const Call& call, const Matrix& d_state, const Stash& first, i64 repeats, const Rows& first_g,
    const Real* phi, const Rows& v, const Rows& d_v, bool adds, Real* d_phi
) {
    for (int slab = 0; slab < v.width; slab += SLAB) {
        int column = slab + lane_id() * COLUMNS;
        Real values[TOKENS][COLUMNS], d_values[TOKENS][COLUMNS] = {};
        load_rows(v, column, values);
        for (int row = 0; row < d_state.n_rows; row += ROWS) {
            Real a[ROWS][COLUMNS], sums[LANES];
            load_tile(d_state, row, column, a);
#pragma unroll
            for (int i = TOKENS - 1; i >= 0; --i) {
                Rows g = first_g;
                for (i64 r = 0; r < repeats; ++r) {
                    Real gradient[COLUMNS];
                    load_row(g, i, column, gradient);
                    g.first += call.d_out.head;
                    Four rho = coefficients(
                        first.rho + 2 * r * TOKENS * d_state.n_rows, d_state.n_rows, i, row
                    );
#pragma unroll
                    for (int j = 0; j < ROWS; ++j) add_multiple(rho.x[j], gradient, a[j]);
                }
                Four f = coefficients(phi, d_state.n_rows, i, row);
#pragma unroll
                for (int j = 0; j < ROWS; ++j) {
                    add_multiple(f.x[j], a[j], d_values[i]);
                    sums[i * ROWS + j] = dot(a[j], values[i]);
                }
            }
            store_tile(d_state, row, column, a);
            add_lane_total(lane_total(sums), d_phi, d_state.n_rows, row, false);
        }
        if (d_v.array->data != nullptr) store_rows(d_v, column, d_values, adds);
    }
}

#endif

// Below compute capability 9.0 the scan needs more registers than MANY_BLOCKS leaves it and would
// spill for wide rows.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int SCAN_BLOCKS = FEW_BLOCKS;
#else
constexpr int SCAN_BLOCKS = MANY_BLOCKS;
#endif

extern "C" __global__ __launch_bounds__(THREADS, SCAN_BLOCKS) void causal_scan(
    const Call call, const double* states
) {
    Scratch scratch = scratch_of(call);
    State state = new_state(call, scratch);
    Hash hash = hash_of(call, scratch);
    Real* phi_k = take_coefficients(scratch, hash.padded_buckets);
    Real* phi_q = take_coefficients(scratch, hash.padded_buckets);
    Real* mass = take_coefficients(scratch, hash.padded_buckets);
    Real* rho = take_coefficients(scratch, hash.padded_buckets);
    Masses masses = masses_of(call, mass, hash.padded_buckets);
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_heads; number += gridDim.x) {
        Task task = task_of(call, number, call.n_heads);
        int m = (int)(task.head / (call.n_heads / call.n_state_heads));
        int kv = (int)(task.head / (call.n_heads / call.n_kv_heads));
        use_head(hash, call, m);
        load_state(state, call, states + (task.index * call.n_state_heads + m) * state_width(call));
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group keys = key_group(call, task, t), queries = query_group(task, t);
            hash_group(hash, rows_of(call.key, keys, kv, (int)call.head_dim), phi_k);
            prefix_mass(phi_k, hash.padded_buckets, state.mass, mass);
            hash_group(hash, rows_of(call.query, queries, task.head, (int)call.head_dim), phi_q);
            weigh(masses, phi_q, rho);
            __syncthreads();
            Rows v = rows_of(call.value, keys, kv, (int)call.value_dim);
            scan_rows(
                state.values, phi_k, v, rho,
                rows_of(call.out, queries, task.head, (int)call.value_dim)
            );
            __syncthreads();
        }
    }
}

__device__ inline void copy(const Real* from, i64 n, Real* to) {
    for (i64 j = thread_id(); j < n; j += THREADS) to[j] = from[j];
}

// Forward in time: gradients of queries, the stash, and the part of each segment in the gradients
// of earlier states, d_sums[segment][query head].
extern "C" __global__ __launch_bounds__(THREADS, FEW_BLOCKS) void causal_scan_queries_backward(
    const Call call, const double* states, double* d_sums, double* hash_parts, Real* stash
) {
    Scratch scratch = scratch_of(call);
    State state = new_state(call, scratch);
    StateSums d_state = state_sums(call, scratch);
    Hash hash = hash_of(call, scratch);
    HashSums hash_total = hash_sums(call, scratch);
    Real* phi_k = take_coefficients(scratch, hash.padded_buckets);
    Real* phi_q = take_coefficients(scratch, hash.padded_buckets);
    Real* mass = take_coefficients(scratch, hash.padded_buckets);
    Real* rho = take_coefficients(scratch, hash.padded_buckets);
    Real* d_phi = take_coefficients(scratch, hash.padded_buckets);
    Real* d_mass = take_coefficients(scratch, hash.padded_buckets);
    Masses masses = masses_of(call, mass, hash.padded_buckets);
    i64 n_rows = TOKENS * hash.planes.n_rows, n_weights = TOKENS * hash.padded_buckets;
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_heads; number += gridDim.x) {
        Task task = task_of(call, number, call.n_heads);
        i64 repeats = call.n_heads / call.n_state_heads;
        int m = (int)(task.head / repeats);
        int kv = (int)(task.head / (call.n_heads / call.n_kv_heads));
        use_head(hash, call, m);
        load_state(state, call, states + (task.index * call.n_state_heads + m) * state_width(call));
        start_state_sums(d_state, d_sums + number * state_width(call));
        start_hash_sums(hash_total, hash_parts + number * call.hash_width);
        for (i64 t = task.begin; t < task.end; t += TOKENS) {
            Group keys = key_group(call, task, t), queries = query_group(task, t);
            Stash saved = stash_of(call, stash, task, t, task.head, m);
            hash_group(hash, rows_of(call.key, keys, kv, (int)call.head_dim), phi_k);
            if (task.head % repeats == 0) copy(hash.u, n_rows, saved.u);
            prefix_mass(phi_k, hash.padded_buckets, state.mass, mass);
            __syncthreads();
            Rows q = rows_of(call.query, queries, task.head, (int)call.head_dim);
            Rows g = rows_of(call.d_out, queries, task.head, (int)call.value_dim);
            hash_group(hash, q, phi_q);
            Real factor = weigh(masses, phi_q, rho);
            // out = rho @ value_sum
            scan_weights(
                state.values, phi_k, rows_of(call.value, keys, kv, (int)call.value_dim), g, d_phi
            );
            // rho = weigh(phi_q, mass). No barrier: the thread wrote its d_phi itself, or the
            // tensor-core version has passed a barrier.
            weigh_backward(masses, phi_q, rho, factor, d_phi, d_mass);
            __syncthreads();
            copy(rho, n_weights, saved.rho);
            copy(d_mass, n_weights, saved.d_mass);
            add_group(d_state, d_mass, rho, g);
            // phi_q = hash(q)
            Rows d_q = rows_of(call.d_query, queries, task.head, (int)call.head_dim);
            hash_group_backward(hash, phi_q, d_phi, q, d_q, false, hash_total);
            if (flushes(task, t)) {
                flush_state_sums(d_state, is_first_flush(task, t));
                flush_hash_sums(hash_total, hash, (int)call.head_dim, is_first_flush(task, t));
            }
        }
    }
}

// d_phi[j] = sum over tokens i >= j of d_mass[i]. d_mass holds the sum over later groups, and
// moves to before this group.
__device__ inline void prefix_mass_backward(
    const Call& call, const Stash& first, i64 repeats, int padded_buckets, double* d_mass,
    Real* d_phi
) {
    for (int s = thread_id(); s < padded_buckets; s += THREADS) {
        Real later = (Real)d_mass[s], sum = 0;
        for (int i = TOKENS - 1; i >= 0; --i) {
            for (i64 r = 0; r < repeats; ++r)
                sum += first.d_mass[(2 * r * TOKENS + i) * padded_buckets + s];
            d_phi[i * padded_buckets + s] = later + sum;
        }
        d_mass[s] += sum;
    }
}

// Backward in time: gradients of keys and values from d_states, the gradients of the states after
// each segment.
extern "C" __global__ __launch_bounds__(THREADS, FEW_BLOCKS) void causal_scan_keys_backward(
    const Call call, const double* d_states, double* hash_parts, Real* stash, i64 d_state_step
) {
    Scratch scratch = scratch_of(call);
    State d_state = new_state(call, scratch);
    Hash hash = hash_of(call, scratch);
    HashSums hash_total = hash_sums(call, scratch);
    Real* phi = take_coefficients(scratch, hash.padded_buckets);
    Real* d_phi = take_coefficients(scratch, hash.padded_buckets);
    i64 repeats = call.n_heads / call.n_state_heads;
    for (i64 number = blockIdx.x; number < call.n_segments * call.n_kv_heads; number += gridDim.x) {
        Task task = task_of(call, number, call.n_kv_heads);
        int kv = task.head;
        int m = (int)(kv * (call.n_state_heads / call.n_kv_heads) + call.state_head);
        use_head(hash, call, m);
        load_state(d_state, call, d_states + (task.index * call.n_state_heads + m) * d_state_step);
        start_hash_sums(
            hash_total, hash_parts + (task.index * call.n_state_heads + m) * call.hash_width
        );
        i64 last = task.begin + (task.end - 1 - task.begin) / TOKENS * TOKENS;
        for (i64 t = last; t >= task.begin; t -= TOKENS) {
            Group keys = key_group(call, task, t), queries = query_group(task, t);
            Stash saved = stash_of(call, stash, task, t, m * repeats, m);
            // hash_projected computes the probabilities of the same u again.
            copy(saved.u, TOKENS * hash.planes.n_rows, hash.u);
            hash_projected(hash, keys.kept, phi);
            // rho and d_mass of a query head belong to the state after their token
            prefix_mass_backward(call, saved, repeats, hash.padded_buckets, d_state.mass, d_phi);
            __syncthreads();
            Rows v = rows_of(call.value, keys, kv, (int)call.value_dim);
            Rows d_v = rows_of(call.d_value, keys, kv, (int)call.value_dim);
            Rows g = rows_of(call.d_out, queries, (int)(m * repeats), (int)call.value_dim);
            // value_sum += phi * v
            scan_rows_backward(
                call, d_state.values, saved, repeats, g, phi, v, d_v, call.state_head > 0, d_phi
            );
            __syncthreads();
            // phi = hash(k)
            Rows k = rows_of(call.key, keys, kv, (int)call.head_dim);
            Rows d_k = rows_of(call.d_key, keys, kv, (int)call.head_dim);
            hash_group_backward(hash, phi, d_phi, k, d_k, call.state_head > 0, hash_total);
            bool ends = t == task.begin;
            if (ends || (last - t) % FLUSH == FLUSH - TOKENS)
                flush_hash_sums(hash_total, hash, (int)call.head_dim, last - t < FLUSH);
        }
    }
}
