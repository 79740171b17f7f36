// SOCKET's kernels over rows: `hash_keys` (codes and norms of keys), `fill_tables` (lookup tables
// of queries), `attend_splits` and `merge_splits` (attention). The kernels over codes and scores
// are in selection.cu, the specification in reference.py beside this file.
//
// Launched by score/cuda.py and attend/cuda.py. Blocks are one warp, except those of
// `merge_splits`; thread mapping as in cuda/warp.cuh.
#include "socket/softmax.cuh"

// Tables of a task. The bits above the lowest eight of so many tables fill whole bytes.
constexpr int TABLES = 8;
constexpr int BLOCK_TOKENS = 64, DIGIT_BITS = 4, DIGIT_VALUES = 16;  // as in layout.py
constexpr int SOFT = 0, HAMMING = 1;

// Planes [G or 1, L*P, D], rows padded with zeros to whole slabs and their number to a multiple of
// ROWS.
struct Planes {
    const Real* data;
    i64 per_head, n_tables, n_planes, head_dim;
};

__device__ inline int tables_in(const Planes& planes, i64 chunk) {
    i64 left = planes.n_tables - chunk * TABLES;
    return (int)(left < TABLES ? left : TABLES);
}

__device__ inline Matrix planes_of(const Planes& planes, i64 g, i64 chunk) {
    int width = round_up((int)planes.head_dim, SLAB);
    int all = round_up((int)(planes.n_tables * planes.n_planes), ROWS);
    i64 row = (planes.per_head ? g * all : 0) + chunk * TABLES * planes.n_planes;
    int n_rows = round_up((int)(tables_in(planes, chunk) * planes.n_planes), ROWS);
    return Matrix{const_cast<Real*>(planes.data) + row * width, n_rows, width};
}

// Every field has eight bytes: score/cuda.py writes the same structure.
struct HashCall {
    Array key, value;
    Planes planes;
    const i64* sequences;   // [B, 2]: number of new tokens, index of the first
    unsigned char* codes;   // [B, G, capacity, rows, 64]
    unsigned short* norms;  // [B, G, capacity * 64]
    i64 n_batch, n_kv_heads, high_bits, capacity, code_rows, value_dim, weighs_keys, weighs_values;
    i64 tokens_per_task, n_runs;  // n_runs: tasks of the longest sequence
};

// Return bits first ... first + n - 1 of a token's code, from its projections u [P] on the planes
// of one table.
__device__ inline unsigned bits_of(const Real* u, int n_planes, int first, int n) {
    unsigned bits = 0;
    for (int i = 0; i < n && first + i < n_planes; ++i)
        bits |= (unsigned)(u[n_planes - 1 - first - i] >= 0) << i;
    return bits;
}

// Write the codes of a group: a byte for every token and row of the tables' part of the index,
// from the projections u [TOKENS][planes].
__device__ inline void write_codes(
    const HashCall& call, const Real* u, int width, i64 chunk, int n, i64 position,
    unsigned char* codes
) {
    int n_tables = tables_in(call.planes, chunk);
    int n_planes = (int)call.planes.n_planes;
    int high = (int)call.high_bits;
    int n_rows = n_tables + (n_tables * high + 7) / 8;
    for (int j = lane_id(); j < n_rows * TOKENS; j += LANES) {
        int i = j % TOKENS, row = j / TOKENS;
        if (i >= n) continue;
        const Real* token = u + i * width;
        unsigned byte = 0;
        i64 target = chunk * TABLES + row;
        if (row < n_tables) {
            byte = bits_of(token + row * n_planes, n_planes, 0, 8);
        } else {
            target = call.planes.n_tables + chunk * high + row - n_tables;
            for (int k = 0; k < 8 / high; ++k) {
                int table = (row - n_tables) * (8 / high) + k;
                if (table < n_tables)
                    byte |= bits_of(token + table * n_planes, n_planes, 8, high) << k * high;
            }
        }
        i64 t = position + i;
        codes[(t / BLOCK_TOKENS * call.code_rows + target) * BLOCK_TOKENS + t % BLOCK_TOKENS] =
            (unsigned char)byte;
    }
}

// Return the length of a row in float64: the square of a float32 may underflow or overflow.
__device__ inline double norm_of(const Rows& rows, int i) {
    double sum = 0;
    for (int column = lane_id() * COLUMNS; column < rows.width; column += SLAB) {
        Real x[COLUMNS];
        load_row(rows, i, column, x);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) sum += (double)x[c] * x[c];
    }
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    return sqrt(sum);
}

// To nearest, ties to even. Too small becomes 0; too large, infinite or NaN the largest number.
__device__ inline unsigned short to_norm16(double norm) {
    union {
        float value;
        unsigned bits;
    } number = {(float)norm};
    i64 rounded = ((i64)number.bits + 0xfff + (number.bits >> 13 & 1)) >> 13;
    i64 bits = rounded - ((127 - 32) << 10);
    return (unsigned short)(bits < 0 ? 0 : bits > 0xffff ? 0xffff : bits);
}

__device__ inline void write_norms(
    const HashCall& call, const Group& group, int g, i64 position, unsigned short* norms
) {
    Rows k = rows_of(call.key, group, g, (int)call.planes.head_dim);
    Rows v = rows_of(call.value, group, g, (int)call.value_dim);
    for (int i = 0; i < group.n; ++i) {
        double norm = 1;
        if (call.weighs_values) norm *= norm_of(v, i);
        if (call.weighs_keys) norm *= norm_of(k, i);
        if (lane_id() == 0) norms[position + i] = to_norm16(norm);
    }
}

// A task is a run of new tokens of a sequence, a key/value head and TABLES tables.
extern "C" __global__ __launch_bounds__(LANES, MANY_BLOCKS) void hash_keys(const HashCall call) {
    Real* u = reinterpret_cast<Real*>(shared_memory);
    i64 n_chunks = (call.planes.n_tables + TABLES - 1) / TABLES;
    for (i64 task = blockIdx.x; task < call.n_batch * call.n_kv_heads * n_chunks * call.n_runs;
         task += gridDim.x) {
        i64 chunk = task % n_chunks;
        i64 run = task / n_chunks % call.n_runs;
        i64 pair = task / n_chunks / call.n_runs;
        i64 b = pair / call.n_kv_heads;
        i64 first = run * call.tokens_per_task;
        i64 end = call.sequences[2 * b];
        int g = (int)(pair % call.n_kv_heads);
        if (first + call.tokens_per_task < end) end = first + call.tokens_per_task;
        Matrix planes = planes_of(call.planes, g, chunk);
        for (i64 t = first; t < end; t += TOKENS) {
            int n = (int)(end - t < TOKENS ? end - t : TOKENS);
            Group group = {b, t, n, (1u << n) - 1};
            i64 position = call.sequences[2 * b + 1] + t;
            i64 of_pair = pair * call.capacity * BLOCK_TOKENS;
            project(planes, rows_of(call.key, group, g, (int)call.planes.head_dim), u);
            __syncthreads();
            write_codes(
                call, u, planes.n_rows, chunk, n, position, call.codes + of_pair * call.code_rows
            );
            if (chunk == 0) write_norms(call, group, g, position, call.norms + of_pair);
            __syncthreads();
        }
    }
}

// Every field has eight bytes: score/cuda.py writes the same structure.
struct TableCall {
    // [B, H, 1, D]: hashed as if the heads of a group were tokens.
    Array query;
    Planes planes;
    Real* tables;  // [B, H, L, N, 16]
    i64 n_batch, n_heads, n_kv_heads, n_digits, kind;
};

// Return the factor (SOFT) or term of a set bit of a key in `one` and of an unset bit in `zero`,
// for a query with projection u.
__device__ inline void bit_entries(
    const TableCall& call, Real u, Real factor, Real& one, Real& zero
) {
    if (call.kind == SOFT) {
        Real y = tangent(u) * factor, e = power_of_e(-magnitude(y)), large = 1 / (1 + e);
        one = y < 0 ? e * large : large;
        zero = y < 0 ? large : e * large;
    } else {
        one = call.kind == HAMMING ? (Real)(u >= 0) : u;
        zero = call.kind == HAMMING ? (Real)(u < 0) : -u;
    }
}

// A task is up to TOKENS heads of a key/value head and TABLES tables. factor = 2 / (sqrt(D) tau).
extern "C" __global__ __launch_bounds__(LANES, MANY_BLOCKS) void fill_tables(
    const TableCall call, double factor
) {
    i64 group = call.n_heads / call.n_kv_heads, n_tiles = (group + TOKENS - 1) / TOKENS;
    i64 n_chunks = (call.planes.n_tables + TABLES - 1) / TABLES;
    int n_planes = (int)call.planes.n_planes, n_digits = (int)call.n_digits;
    for (i64 task = blockIdx.x; task < call.n_batch * call.n_kv_heads * n_tiles * n_chunks;
         task += gridDim.x) {
        i64 chunk = task % n_chunks;
        i64 tile = task / n_chunks % n_tiles;
        i64 pair = task / n_chunks / n_tiles;
        i64 b = pair / call.n_kv_heads;
        i64 g = pair % call.n_kv_heads;
        i64 left = group - tile * TOKENS;
        i64 head = g * group + tile * TOKENS;
        int n = (int)(left < TOKENS ? left : TOKENS);
        int n_tables = tables_in(call.planes, chunk);
        Matrix planes = planes_of(call.planes, g, chunk);
        Real* one = reinterpret_cast<Real*>(shared_memory);
        Real* zero = one + TOKENS * planes.n_rows;
        project(
            planes,
            rows_of(call.query, Group{b, head, n, (1u << n) - 1}, 0, (int)call.planes.head_dim), one
        );
        __syncthreads();
        for (int j = lane_id(); j < TOKENS * planes.n_rows; j += LANES)
            bit_entries(call, one[j], (Real)factor, one[j], zero[j]);
        __syncthreads();
        int entries = n_tables * n_digits * DIGIT_VALUES;  // of a head, contiguous
        for (int j = lane_id(); j < n * entries; j += LANES) {
            int i = j / entries;
            int value = j % DIGIT_VALUES;
            int digit = j / DIGIT_VALUES % n_digits;
            int table = j % entries / DIGIT_VALUES / n_digits;
            const Real* set = one + i * planes.n_rows + table * n_planes;
            const Real* unset = zero + i * planes.n_rows + table * n_planes;
            Real product = call.kind == SOFT ? 1 : 0;
            for (int bit = digit * DIGIT_BITS; bit < (digit + 1) * DIGIT_BITS && bit < n_planes;
                 ++bit) {
                int p = n_planes - 1 - bit;
                Real entry = value >> bit % DIGIT_BITS & 1 ? set[p] : unset[p];
                product = call.kind == SOFT ? product * entry : product + entry;
            }
            i64 first = ((b * call.n_heads + head + i) * call.planes.n_tables + chunk * TABLES) *
                        n_digits * DIGIT_VALUES;
            call.tables[first + j % entries] = product;
        }
        __syncthreads();
    }
}

// Write peak, weight and weighted values of each row of a split; only a weight of zero if the tile
// sees none of its tokens.
__device__ inline void write_split(
    const AttendCall& call, const Tile& tile, LaneRows& lane, const Matrix& sums, Real* partial
) {
    i64 step = call.n_splits * (2 + call.value_dim);  // row stride
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
        if (k * ROWS >= tile.padded_rows) continue;
        for (int other = ROWS; other < LANES; other *= 2)
            lane.weight[k] += __shfl_xor_sync(~0u, lane.weight[k], other);
        int row = k * ROWS + lane_id();
        if (lane_id() >= ROWS || row >= tile.n_rows) continue;
        partial[row * step] = lane.peak[k];
        partial[row * step + 1] = lane.weight[k];
    }
    if (tile.begin >= tile.end) return;
    for (int row = 0; row < tile.n_rows; ++row)
        for (int column = lane_id() * COLUMNS; column < sums.width; column += SLAB)
            for (int d = column; d < column + COLUMNS && d < call.value_dim; ++d)
                partial[row * step + 2 + d] = sums.data[(i64)row * sums.width + d];
}

// A task is a tile and a split of the tokens that it sees.
extern "C" __global__ __launch_bounds__(LANES, FEW_BLOCKS) void attend_splits(
    const AttendCall call
) {
    Real* numbers = call.workspace != nullptr ? call.workspace + blockIdx.x * call.scratch_numbers
                                              : reinterpret_cast<Real*>(shared_memory);
    i64 n_tiles = (call.n_rows + call.tile_rows - 1) / call.tile_rows;
    i64 n_tasks = call.n_batch * call.n_head_groups * n_tiles * call.n_splits;
    for (i64 task = blockIdx.x; task < n_tasks; task += gridDim.x) {
        i64 split = task % call.n_splits;
        i64 number = task / call.n_splits % n_tiles;
        i64 head_group = task / call.n_splits / n_tiles;
        Tile tile = tile_of(call, head_group, number, split);
        // Pieces have the size of whole tiles: the same addresses for every task.
        Scratch scratch = {numbers};
        int padded_head_dim = round_up((int)call.head_dim, SLAB);
        int padded_value_dim = round_up((int)call.value_dim, SLAB);
        Matrix q = {
            scratch.take(call.tile_rows * padded_head_dim), tile.padded_rows, padded_head_dim
        };
        Matrix sums = {
            scratch.take(call.tile_rows * padded_value_dim), tile.padded_rows, padded_value_dim
        };
        Real* c = scratch.take(TOKENS * call.tile_rows);
        Real* factors = scratch.take(call.tile_rows);
        LaneRows lane = new_lane_rows(call, tile);
        if (tile.begin < tile.end) {
            load_queries(call, tile, q);
            // clear the columns of this lane; no other lane reads them
            for (int row = 0; row < sums.n_rows; ++row)
                for (int column = lane_id() * COLUMNS; column < sums.width; column += SLAB)
                    for (int d = 0; d < COLUMNS; ++d)
                        sums.data[(i64)row * sums.width + column + d] = 0;
        }
        for (i64 t = tile.begin; t < tile.end; t += TOKENS) {
            Tokens tokens = tokens_at(tile, t);
            dot_keys(call, tokens, q, c);
            weigh(tile, tokens, c, factors, lane);
            __syncthreads();
            add_values(call, tile, tokens, c, factors, sums);
            __syncthreads();
        }
        i64 row = head_group * call.n_rows + number * call.tile_rows;
        write_split(
            call, tile, lane, sums,
            call.partial + (row * call.n_splits + split) * (2 + call.value_dim)
        );
    }
}

// Warps of a block, which divide the splits.
constexpr int MERGE_WARPS = 8;
constexpr int MERGE_THREADS = LANES * MERGE_WARPS;

// A task is a row of the output. Warp w adds splits w, w + MERGE_WARPS, ... in float64; then warp
// 0 adds the sums of the warps in order. The order depends on nothing but the number of splits.
extern "C" __global__ __launch_bounds__(MERGE_THREADS) void merge_splits(const AttendCall call) {
    double *values = shared_memory, *weights = values + MERGE_WARPS * LANES;
    int lane = (int)threadIdx.x % LANES, warp = (int)threadIdx.x / LANES;
    i64 width = 2 + call.value_dim;
    for (i64 task = blockIdx.x; task < call.n_batch * call.n_head_groups * call.n_rows;
         task += gridDim.x) {
        const Real* row = call.partial + task * call.n_splits * width;
        Real top = minus_infinity();
        for (i64 split = lane; split < call.n_splits; split += LANES)
            top = row[split * width] > top ? row[split * width] : top;
        for (int step = 1; step < LANES; step *= 2) {
            Real other = __shfl_xor_sync(~0u, top, step);
            top = other > top ? other : top;
        }
        i64 b = call.first_batch + task / call.n_rows / call.n_head_groups;
        i64 r = call.first_row + task % call.n_rows;
        i64 head = task / call.n_rows % call.n_head_groups * call.heads_per_group +
                   r % call.heads_per_group;
        Stored* out = call.out.data + b * call.out.batch +
                      r / call.heads_per_group * call.out.token + head * call.out.head;
        for (i64 d = lane; d < round_up((int)call.value_dim, LANES); d += LANES) {
            double value = 0, weight = 0;
            for (i64 split = warp; split < call.n_splits; split += MERGE_WARPS) {
                const Real* part = row + split * width;
                if (part[1] == 0) continue;
                double factor = power_of_e(part[0] - top);
                weight += factor * part[1];
                if (d < call.value_dim) value += factor * part[2 + d];
            }
            values[threadIdx.x] = value;
            weights[threadIdx.x] = weight;
            __syncthreads();
            for (int other = 1; other < MERGE_WARPS && warp == 0; ++other) {
                value += values[other * LANES + lane];
                weight += weights[other * LANES + lane];
            }
            if (warp == 0 && d < call.value_dim)
                out[d * call.out.dim] =
                    to_stored((Real)(weight != 0 ? value / weight : 0), Stored());
            __syncthreads();
        }
    }
}
