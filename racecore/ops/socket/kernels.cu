// SOCKET where it goes over rows: bits and norms of keys, tables of queries, attention; see reference.py for the same in
// plain NumPy. What goes over codes and scores is in selection.cu.
#include "socket/softmax.cuh"

constexpr int TABLES = 8;  // of a task: those whose bits above the lowest eight share bytes are together
constexpr int BLOCK_TOKENS = 64, DIGIT_BITS = 4, DIGIT_VALUES = 16;  // see layout.py
constexpr int SOFT = 0, HAMMING = 1;

// Planes [G or 1, L*P, D], rows padded with zeros to whole slabs, and their number to a multiple of ROWS.
struct Planes {
    const Real* data;
    i64 per_head, n_tables, n_planes, head_dim;
};

__device__ inline int tables_in(const Planes& planes, i64 chunk) {
    i64 left = planes.n_tables - chunk * TABLES;
    return (int)(left < TABLES ? left : TABLES);
}

__device__ inline Matrix planes_of(const Planes& planes, i64 g, i64 chunk) {
    int width = round_up((int)planes.head_dim, SLAB), all = round_up((int)(planes.n_tables * planes.n_planes), ROWS);
    i64 row = (planes.per_head ? g * all : 0) + chunk * TABLES * planes.n_planes;
    int n_rows = round_up((int)(tables_in(planes, chunk) * planes.n_planes), ROWS);
    return Matrix{const_cast<Real*>(planes.data) + row * width, n_rows, width};
}

// Eight bytes each: racecore.ops.socket.cuda builds the same structure.
struct Hashing {
    Array key, value;
    Planes planes;
    const i64* sequences;   // [B, 2]: how many tokens are new, and the place of the first in the index
    unsigned char* codes;   // [B, G, room, rows, 64]
    unsigned short* norms;  // [B, G, room * 64]
    i64 n_batch, n_kv_heads, high_bits, room, code_rows, value_dim, weighs_keys, weighs_values;
    i64 run, n_runs;  // tokens of a task, and how many of such the longest sequence has
};

// Bits first ... first + n - 1 of a token's code, given its projections u [P] on the planes of a table.
__device__ inline unsigned bits_of(const Real* u, int n_planes, int first, int n) {
    unsigned bits = 0;
    for (int i = 0; i < n && first + i < n_planes; ++i) bits |= (unsigned)(u[n_planes - 1 - first - i] >= 0) << i;
    return bits;
}

// A byte for every token of a group and row of the tables' part of the index; u [TOKENS][planes].
__device__ inline void write_codes(
    const Hashing& call, const Real* u, int width, i64 chunk, int n, i64 place, unsigned char* codes) {
    int n_tables = tables_in(call.planes, chunk), n_planes = (int)call.planes.n_planes, high = (int)call.high_bits;
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
                if (table < n_tables) byte |= bits_of(token + table * n_planes, n_planes, 8, high) << k * high;
            }
        }
        i64 t = place + i;
        codes[(t / BLOCK_TOKENS * call.code_rows + target) * BLOCK_TOKENS + t % BLOCK_TOKENS] = (unsigned char)byte;
    }
}

// The length of a row, in float64: the square of a float32 may be none.
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

// To nearest, ties to even; what is too small becomes 0, what is too large, infinite or NaN the largest number.
__device__ inline unsigned short to_norm16(double norm) {
    union {
        float value;
        unsigned bits;
    } wide = {(float)norm};
    i64 rounded = ((i64)wide.bits + 0xfff + (wide.bits >> 13 & 1)) >> 13, own = rounded - ((127 - 32) << 10);
    return (unsigned short)(own < 0 ? 0 : own > 0xffff ? 0xffff : own);
}

__device__ inline void write_norms(const Hashing& call, const Group& group, int g, i64 place, unsigned short* norms) {
    Rows k = rows_of(call.key, group, g, (int)call.planes.head_dim), v = rows_of(call.value, group, g, (int)call.value_dim);
    for (int i = 0; i < group.n; ++i) {
        double norm = 1;
        if (call.weighs_values) norm *= norm_of(v, i);
        if (call.weighs_keys) norm *= norm_of(k, i);
        if (lane_id() == 0) norms[place + i] = to_norm16(norm);
    }
}

// A task is a run of a sequence's new tokens, a key/value head and TABLES tables.
extern "C" __global__ __launch_bounds__(LANES, MANY) void hash_keys(const Hashing call) {
    Real* u = reinterpret_cast<Real*>(shared_memory);
    i64 n_chunks = (call.planes.n_tables + TABLES - 1) / TABLES;
    for (i64 task = blockIdx.x; task < call.n_batch * call.n_kv_heads * n_chunks * call.n_runs; task += gridDim.x) {
        i64 chunk = task % n_chunks, run = task / n_chunks % call.n_runs, pair = task / n_chunks / call.n_runs;
        i64 b = pair / call.n_kv_heads, first = run * call.run, end = call.sequences[2 * b];
        int g = (int)(pair % call.n_kv_heads);
        if (first + call.run < end) end = first + call.run;
        Matrix planes = planes_of(call.planes, g, chunk);
        for (i64 t = first; t < end; t += TOKENS) {
            int n = (int)(end - t < TOKENS ? end - t : TOKENS);
            Group group = {b, t, n, (1u << n) - 1};
            i64 place = call.sequences[2 * b + 1] + t, of_pair = pair * call.room * BLOCK_TOKENS;
            project(planes, rows_of(call.key, group, g, (int)call.planes.head_dim), u);
            __syncthreads();
            write_codes(call, u, planes.n_rows, chunk, n, place, call.codes + of_pair * call.code_rows);
            if (chunk == 0) write_norms(call, group, g, place, call.norms + of_pair);
            __syncthreads();
        }
    }
}

// Eight bytes each: racecore.ops.socket.cuda builds the same structure.
struct Querying {
    Array query;  // its axis of tokens is that of heads
    Planes planes;
    Real* tables;  // [B, H, L, N, 16]
    i64 n_batch, n_heads, n_kv_heads, n_digits, kind;
};

// What a set bit of a key is worth to a query with projection u, to `one`, and an unset one to `zero`.
__device__ inline void worth_of_bits(const Querying& call, Real u, Real factor, Real& one, Real& zero) {
    if (call.kind == SOFT) {
        Real y = tangent(u) * factor, e = power_of_e(-magnitude(y)), large = 1 / (1 + e);
        one = y < 0 ? e * large : large;
        zero = y < 0 ? large : e * large;
    } else {
        one = call.kind == HAMMING ? (Real)(u >= 0) : u;
        zero = call.kind == HAMMING ? (Real)(u < 0) : -u;
    }
}

// A task is up to TOKENS heads of a group and TABLES tables. factor = 2 / (sqrt(D) tau)
extern "C" __global__ __launch_bounds__(LANES, MANY) void fill_tables(const Querying call, double factor) {
    i64 group = call.n_heads / call.n_kv_heads, n_tiles = (group + TOKENS - 1) / TOKENS;
    i64 n_chunks = (call.planes.n_tables + TABLES - 1) / TABLES;
    int n_planes = (int)call.planes.n_planes, n_digits = (int)call.n_digits;
    for (i64 task = blockIdx.x; task < call.n_batch * call.n_kv_heads * n_tiles * n_chunks; task += gridDim.x) {
        i64 chunk = task % n_chunks, tile = task / n_chunks % n_tiles, pair = task / n_chunks / n_tiles;
        i64 b = pair / call.n_kv_heads, g = pair % call.n_kv_heads, left = group - tile * TOKENS;
        i64 head = g * group + tile * TOKENS;
        int n = (int)(left < TOKENS ? left : TOKENS), n_tables = tables_in(call.planes, chunk);
        Matrix planes = planes_of(call.planes, g, chunk);
        Real *one = reinterpret_cast<Real*>(shared_memory), *zero = one + TOKENS * planes.n_rows;
        project(planes, rows_of(call.query, Group{b, head, n, (1u << n) - 1}, 0, (int)call.planes.head_dim), one);
        __syncthreads();
        for (int j = lane_id(); j < TOKENS * planes.n_rows; j += LANES)
            worth_of_bits(call, one[j], (Real)factor, one[j], zero[j]);
        __syncthreads();
        int entries = n_tables * n_digits * DIGIT_VALUES;  // of a head, next to each other
        for (int j = lane_id(); j < n * entries; j += LANES) {
            int i = j / entries, value = j % DIGIT_VALUES, digit = j / DIGIT_VALUES % n_digits;
            int table = j % entries / DIGIT_VALUES / n_digits;
            const Real *set = one + i * planes.n_rows + table * n_planes, *unset = zero + i * planes.n_rows + table * n_planes;
            Real worth = call.kind == SOFT ? 1 : 0;
            for (int bit = digit * DIGIT_BITS; bit < (digit + 1) * DIGIT_BITS && bit < n_planes; ++bit) {
                int p = n_planes - 1 - bit;
                Real its = value >> bit % DIGIT_BITS & 1 ? set[p] : unset[p];
                worth = call.kind == SOFT ? worth * its : worth + its;
            }
            i64 first = ((b * call.n_heads + head + i) * call.planes.n_tables + chunk * TABLES) * n_digits * DIGIT_VALUES;
            call.tables[first + j % entries] = worth;
        }
        __syncthreads();
    }
}

// Peaks, weights and weighted values of a share; nothing but a weight of zero if the tile sees none of it.
__device__ inline void write_share(const Attention& call, const Tile& tile, Own& own, const Matrix& sums, Real* partial) {
    i64 step = call.n_shares * (2 + call.value_dim);  // from row to row
#pragma unroll
    for (int k = 0; k < TILES; ++k) {
        if (k * ROWS >= tile.wide_rows) continue;
        for (int other = ROWS; other < LANES; other *= 2) own.weight[k] += __shfl_xor_sync(~0u, own.weight[k], other);
        int row = k * ROWS + lane_id();
        if (lane_id() >= ROWS || row >= tile.n_rows) continue;
        partial[row * step] = own.peak[k];
        partial[row * step + 1] = own.weight[k];
    }
    if (tile.begin >= tile.end) return;
    for (int row = 0; row < tile.n_rows; ++row)
        for (int column = lane_id() * COLUMNS; column < sums.width; column += SLAB)
            for (int d = column; d < column + COLUMNS && d < call.value_dim; ++d)
                partial[row * step + 2 + d] = sums.data[(i64)row * sums.width + d];
}

// A task is a tile and a share of the tokens that it sees.
extern "C" __global__ __launch_bounds__(LANES, SOME) void attend_shares(const Attention call) {
    Real* numbers = call.workspace != nullptr ? call.workspace + blockIdx.x * call.scratch_numbers
                                              : reinterpret_cast<Real*>(shared_memory);
    i64 n_tiles = (call.n_rows + call.tile_rows - 1) / call.tile_rows;
    i64 n_tasks = call.n_batch * call.n_owners * n_tiles * call.n_shares;
    for (i64 task = blockIdx.x; task < n_tasks; task += gridDim.x) {
        i64 share = task % call.n_shares, number = task / call.n_shares % n_tiles, owner = task / call.n_shares / n_tiles;
        Tile tile = tile_of(call, owner, number, share);
        Scratch scratch = {numbers};  // for whole tiles, so that nothing moves from one task to the next
        int wide_d = round_up((int)call.head_dim, SLAB), wide_v = round_up((int)call.value_dim, SLAB);
        Matrix q = {scratch.take(call.tile_rows * wide_d), tile.wide_rows, wide_d};
        Matrix sums = {scratch.take(call.tile_rows * wide_v), tile.wide_rows, wide_v};
        Real *c = scratch.take(TOKENS * call.tile_rows), *factors = scratch.take(call.tile_rows);
        Own own = nothing_yet(call, tile);
        if (tile.begin < tile.end) {
            load_queries(call, tile, q);
            for (int row = 0; row < sums.n_rows; ++row)  // the lane's own columns
                for (int column = lane_id() * COLUMNS; column < sums.width; column += SLAB)
                    for (int d = 0; d < COLUMNS; ++d) sums.data[(i64)row * sums.width + column + d] = 0;
        }
        for (i64 t = tile.begin; t < tile.end; t += TOKENS) {
            Tokens tokens = tokens_at(tile, t);
            dot_keys(call, tokens, q, c);
            weigh(tile, tokens, c, factors, own);
            __syncthreads();
            add_values(call, tile, tokens, c, factors, sums);
            __syncthreads();
        }
        i64 row = owner * call.n_rows + number * call.tile_rows;
        write_share(call, tile, own, sums, call.partial + (row * call.n_shares + share) * (2 + call.value_dim));
    }
}

constexpr int WAYS = 8;  // warps of a block, among which shares are dealt out

// A block writes one row: its shares added up in float64, eight ways of every eighth share, and then these, in order.
extern "C" __global__ __launch_bounds__(LANES * WAYS) void join_shares(const Attention call) {
    double *values = shared_memory, *weights = values + WAYS * LANES;
    int lane = (int)threadIdx.x % LANES, way = (int)threadIdx.x / LANES;
    i64 width = 2 + call.value_dim;
    for (i64 task = blockIdx.x; task < call.n_batch * call.n_owners * call.n_rows; task += gridDim.x) {
        const Real* row = call.partial + task * call.n_shares * width;
        Real top = minus_infinity();
        for (i64 share = lane; share < call.n_shares; share += LANES) top = row[share * width] > top ? row[share * width] : top;
        for (int step = 1; step < LANES; step *= 2) {
            Real other = __shfl_xor_sync(~0u, top, step);
            top = other > top ? other : top;
        }
        i64 b = call.first_batch + task / call.n_rows / call.n_owners, r = call.first_row + task % call.n_rows;
        i64 head = task / call.n_rows % call.n_owners * call.sharing + r % call.sharing;
        Stored* out = call.out.data + b * call.out.batch + r / call.sharing * call.out.token + head * call.out.head;
        for (i64 d = lane; d < round_up((int)call.value_dim, LANES); d += LANES) {
            double value = 0, weight = 0;
            for (i64 share = way; share < call.n_shares; share += WAYS) {
                const Real* part = row + share * width;
                if (part[1] == 0) continue;
                double factor = power_of_e(part[0] - top);
                weight += factor * part[1];
                if (d < call.value_dim) value += factor * part[2 + d];
            }
            values[threadIdx.x] = value;
            weights[threadIdx.x] = weight;
            __syncthreads();
            for (int other = 1; other < WAYS && way == 0; ++other) {
                value += values[other * LANES + lane];
                weight += weights[other * LANES + lane];
            }
            if (way == 0 && d < call.value_dim)
                out[d * call.out.dim] = to_stored((Real)(weight != 0 ? value / weight : 0), Stored());
            __syncthreads();
        }
    }
}
