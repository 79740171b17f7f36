// From the lookup tables of a query to its tokens: `score_keys` computes the scores of all keys,
// `select_tokens` the top-k in ascending order of tokens. The kernels over rows are in kernels.cu,
// the specification in reference.py beside this file. Launched by score/cuda.py and
// select/cuda.py.
//
// `score_keys`: a block of four warps scores a run of code blocks, a warp takes one block of 64
// tokens at a time, a lane two tokens. `select_tokens`: a block of up to 32 warps takes a row of
// scores.
#include "cuda/warp.cuh"

constexpr int BLOCK_TOKENS = 64;      // tokens of a block of codes, see layout.py
constexpr int HEADS = 4;              // heads scored while a token's code is in registers
constexpr int BINS = 256;             // values of an eight-bit digit of a score
constexpr int TOKENS_PER_THREAD = 8;  // adjacent tokens of a thread in `write_top_k`
constexpr int LOADS_IN_FLIGHT = 4;    // loads in flight of a thread in `count_digits`

template <int SIZE>
struct Bits;
template <>
struct Bits<4> {
    typedef unsigned Key;
    static constexpr Key INFINITE = 0x7f800000;
};
template <>
struct Bits<8> {
    typedef unsigned long long Key;
    static constexpr Key INFINITE = 0x7ff0000000000000;
};
typedef Bits<sizeof(Real)>::Key Key;
constexpr int KEY_BITS = 8 * sizeof(Key);
union Number {
    Key bits;
    Real value;
};

__device__ inline int lane_of_warp() { return (int)threadIdx.x % LANES; }
__device__ inline int warp_of_block() { return (int)threadIdx.x / LANES; }
__device__ inline int n_warps() { return (int)blockDim.x / LANES; }

// Every field has eight bytes: score/cuda.py writes the same structure.
struct ScoreCall {
    const Real* tables;           // [B, H, L, N, 16]
    const unsigned char* codes;   // [B, G, capacity, rows, 64]
    const unsigned short* norms;  // [B, G, capacity * 64]
    const i64* lengths;           // [B]
    // [n_pairs, group, width], or [n_pairs, width] if the heads of a group are summed.
    Real* out;
    i64 first_pair, n_pairs;  // a pair: sequence and key/value head
    i64 n_heads, n_kv_heads, n_tables, n_digits, high_bits, multiplies, capacity, code_rows, width;
    i64 blocks_per_task;  // blocks of codes scored with one copy of the tables
    i64 heads_at_once;    // HEADS, or fewer if so many tables exceed shared memory
    i64 has_copies;       // whether the tables of one head fit shared memory
    i64 adds_heads;
};

struct alignas(2 * sizeof(Real)) Two {
    Real x[2];
};

// Never fused with an addition: the sum of a group has the bits of the sum of its heads' scores.
#ifdef __CUDA_ARCH__
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product(double x, double y) { return __dmul_rn(x, y); }
#else
__device__ inline Real product(Real x, Real y) { return x * y; }
#endif

// The value of a 16-bit norm: 6 bits of exponent, 10 of fraction.
__device__ inline Real norm_of(unsigned short norm) {
    union {
        unsigned bits;
        float value;
    } number = {norm == 0 ? 0u : ((unsigned)norm << 13) + ((127u - 32u) << 23)};
    return number.value;
}

// totals[head][token] = sum over tables of the product (or sum) of the table entries of a token's
// digits, for the two tokens of a lane and `n` heads.
template <int DIGITS, bool MULTIPLIES>
__device__ inline void collide(
    const ScoreCall& call, const unsigned char* codes, const Real* tables, int n,
    Real (&totals)[HEADS][2]
) {
    const unsigned short* pairs = reinterpret_cast<const unsigned short*>(codes) + lane_of_warp();
    int n_tables = (int)call.n_tables;
#pragma unroll 4
    for (int table = 0; table < n_tables; ++table) {
        unsigned pair = pairs[table * (BLOCK_TOKENS / 2)];
        unsigned code[2] = {pair & 0xff, pair >> 8};
        // Bits of the next tables may come along: the entries do not depend on them.
        if constexpr (DIGITS > 2) {
            int bit = table * (int)call.high_bits;
            unsigned above = pairs[(n_tables + bit / 8) * (BLOCK_TOKENS / 2)];
            code[0] |= (above & 0xff) >> bit % 8 << 8;
            code[1] |= above >> 8 >> bit % 8 << 8;
        }
#pragma unroll
        for (int h = 0; h < HEADS; ++h) {
            if (h >= n) continue;
            const Real* entries = tables + ((i64)h * n_tables + table) * (DIGITS * 16);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                Real value = entries[code[i] & 15];
#pragma unroll
                for (int digit = 1; digit < DIGITS; ++digit) {
                    Real entry = entries[digit * 16 + (code[i] >> 4 * digit & 15)];
                    value = MULTIPLIES ? value * entry : value + entry;
                }
                totals[h][i] += value;
            }
        }
    }
}

__device__ inline void collide(
    const ScoreCall& call, const unsigned char* codes, const Real* tables, int n,
    Real (&totals)[HEADS][2]
) {
    switch (call.n_digits * 2 + call.multiplies) {
        case 4: return collide<2, false>(call, codes, tables, n, totals);
        case 5: return collide<2, true>(call, codes, tables, n, totals);
        case 6: return collide<3, false>(call, codes, tables, n, totals);
        case 7: return collide<3, true>(call, codes, tables, n, totals);
        case 8: return collide<4, false>(call, codes, tables, n, totals);
        default: return collide<4, true>(call, codes, tables, n, totals);
    }
}

// Write the scores of a block of codes for heads first_head ... first_head + n - 1 of a group.
__device__ inline void score_block(
    const ScoreCall& call, i64 pair, i64 block, const Real* tables, int first_head, int n
) {
    i64 t = block * BLOCK_TOKENS + 2 * lane_of_warp();
    i64 length = call.lengths[pair / call.n_kv_heads];
    Real totals[HEADS][2] = {}, norms[2] = {};
    if (block * BLOCK_TOKENS < length) {
        collide(
            call, call.codes + (pair * call.capacity + block) * call.code_rows * BLOCK_TOKENS,
            tables, n, totals
        );
        const unsigned short* source = call.norms + pair * call.capacity * BLOCK_TOKENS + t;
        for (int i = 0; i < 2; ++i) norms[i] = norm_of(source[i]);
    }
    i64 group = call.n_heads / call.n_kv_heads, row = pair - call.first_pair;
    Number infinity = {Bits<sizeof(Real)>::INFINITE};
    Two sum = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (h >= n) continue;
        i64 out_row = call.adds_heads ? row : row * group + first_head + h;
        Two* target = reinterpret_cast<Two*>(call.out + out_row * call.width + t);
        if (call.adds_heads && h == 0 && first_head > 0) sum = *target;
        Two score;
        for (int i = 0; i < 2; ++i) {
            score.x[i] = t + i < length ? product(totals[h][i], norms[i]) : -infinity.value;
            sum.x[i] = first_head + h == 0 ? score.x[i] : sum.x[i] + score.x[i];
        }
        if (!call.adds_heads || h == n - 1) *target = call.adds_heads ? sum : score;
    }
}

// A task is a pair and a run of blocks of codes; the warps of a block take its blocks in turn.
extern "C" __global__ __launch_bounds__(128) void score_keys(const ScoreCall call) {
    Real* copies = reinterpret_cast<Real*>(shared_memory);
    int group = (int)(call.n_heads / call.n_kv_heads);
    i64 n_blocks = call.width / BLOCK_TOKENS;
    i64 n_runs = (n_blocks + call.blocks_per_task - 1) / call.blocks_per_task;
    i64 numbers = call.n_tables * call.n_digits * 16;  // numbers of the tables of one head
    for (i64 task = blockIdx.x; task < call.n_pairs * n_runs; task += gridDim.x) {
        i64 pair = call.first_pair + task / n_runs;
        i64 first = task % n_runs * call.blocks_per_task;
        i64 last =
            first + call.blocks_per_task < n_blocks ? first + call.blocks_per_task : n_blocks;
        for (int head = 0; head < group; head += (int)call.heads_at_once) {
            int n = (int)(group - head < call.heads_at_once ? group - head : call.heads_at_once);
            const Real* tables = call.tables + (pair * group + head) * numbers;
            if (call.has_copies) {
                for (i64 i = threadIdx.x; i < n * numbers; i += blockDim.x) copies[i] = tables[i];
                tables = copies;
                __syncthreads();
            }
            for (i64 block = first + warp_of_block(); block < last; block += n_warps())
                score_block(call, pair, block, tables, head, n);
            if (call.has_copies) __syncthreads();
        }
    }
}

// Top-k by radix select. Scores become integers of the same order, and the k-th largest is found
// digit by digit: a histogram counts each digit among the scores that agree with the digits found
// so far. Counts are integers, so atomic additions give the same result in any order.
// Every field has eight bytes: select/cuda.py writes the same structure.
struct SelectCall {
    const Real* scores;  // [n_rows, width]
    const i64* lengths;  // [B]
    const i64* budgets;  // [B]
    i64* selected;       // [all rows, n_selected]
    i64 first_row, n_rows, rows_per_sequence, width, sink, window, n_selected;
};

// The key of the k-th largest score, and how many scores equal to it belong to the top-k.
struct Threshold {
    Key key;
    i64 n_equal;
};

// Return an integer that orders like the score. -0 equals 0, and NaN equals infinity.
__device__ inline Key key_of(Real score) {
    Number number;
    number.value = score;
    constexpr Key SIGN = (Key)1 << (KEY_BITS - 1), INFINITE = Bits<sizeof(Real)>::INFINITE;
    Key size = number.bits & ~SIGN;
    if (size == 0) return SIGN;
    if (size > INFINITE) return SIGN | INFINITE;
    return number.bits & SIGN ? ~number.bits : number.bits | SIGN;
}

struct alignas(16) Quad {
    Real x[4];
};

// Count the digits at `shift` of all keys that have the digits of `threshold` above it.
__device__ inline void count_digits(
    const Real* scores, i64 n, Key threshold, int shift, unsigned* bins
) {
    // Consecutive equal digits are added at once: atomic additions to one address wait for each
    // other.
    unsigned count = 0, last = 0;
    int step = (int)blockDim.x * 4;
    // scores of one iteration
    int n_loaded = step * LOADS_IN_FLIGHT;
    for (i64 first = 0; first < n; first += n_loaded) {
        // From here on 32-bit offsets suffice.
        int left = (int)(n - first < n_loaded ? n - first : n_loaded);
        Quad quads[LOADS_IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < LOADS_IN_FLIGHT; ++i) {
            int position = i * step + (int)threadIdx.x * 4;
            if (position < left)
                quads[i] = *reinterpret_cast<const Quad*>(scores + first + position);
        }
#pragma unroll
        for (int j = 0; j < 4 * LOADS_IN_FLIGHT; ++j) {
            if (j / 4 * step + (int)threadIdx.x * 4 + j % 4 >= left) continue;
            Key key = key_of(quads[j / 4].x[j % 4]);
            if (shift + 8 < KEY_BITS && key >> (shift + 8) != threshold >> (shift + 8)) continue;
            unsigned digit = (unsigned)(key >> shift) % BINS;
            if (digit != last && count > 0) {
                atomicAdd(bins + last, count);
                count = 0;
            }
            last = digit;
            count += 1;
        }
    }
    if (count > 0) atomicAdd(bins + last, count);
}

// Return the sum of x over the lanes before this one; total = that over the warp.
__device__ inline unsigned sum_before(unsigned x, unsigned& total) {
    unsigned before = 0;
    total = x;
    for (int step = 1; step < LANES; step *= 2) {
        unsigned other = __shfl_xor_sync(~0u, total, step);
        if (lane_of_warp() & step) before += other;
        total += other;
    }
    return before;
}

// The same over the threads of a block. warp_sums: one number of shared memory per warp.
__device__ inline unsigned sum_before(unsigned x, unsigned* warp_sums, unsigned& total) {
    unsigned of_warp, before = sum_before(x, of_warp);
    if (lane_of_warp() == 0) warp_sums[warp_of_block()] = of_warp;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < n_warps(); ++warp) {
        if (warp < warp_of_block()) before += warp_sums[warp];
        total += warp_sums[warp];
    }
    __syncthreads();
    return before;
}

// Choose the digit at `shift`: the largest with fewer than n_equal keys above it. Every warp
// computes it for itself.
__device__ inline Threshold refined(const unsigned* bins, Threshold threshold, int shift) {
    constexpr int LANE_BINS = BINS / LANES;
    const unsigned* lane_bins =
        bins + BINS - 1 - lane_of_warp() * LANE_BINS;  // the bins of this lane, from here downwards
    unsigned sum = 0, total;
    for (int i = 0; i < LANE_BINS; ++i) sum += lane_bins[-i];
    i64 above = sum_before(sum, total);
    unsigned digit = 0, left = 0;
    if (above < threshold.n_equal &&
        threshold.n_equal <= above + sum) {  // true in exactly one lane
        int i = 0;
        for (; above + lane_bins[-i] < threshold.n_equal; ++i) above += lane_bins[-i];
        digit = BINS - 1 - lane_of_warp() * LANE_BINS - i;
        left = (unsigned)(threshold.n_equal - above);
    }
    for (int step = 1; step < LANES; step *= 2) {
        digit += __shfl_xor_sync(~0u, digit, step);
        left += __shfl_xor_sync(~0u, left, step);
    }
    return Threshold{threshold.key | (Key)digit << shift, left};
}

__device__ inline Threshold threshold_of(const Real* scores, i64 n, i64 budget, unsigned* bins) {
    if (budget == 0) return Threshold{~(Key)0, 0};  // larger than every key
    Threshold threshold = {0, budget};
    for (int shift = KEY_BITS - 8; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x) bins[i] = 0;
        __syncthreads();
        count_digits(scores, n, threshold.key, shift, bins);
        __syncthreads();
        threshold = refined(bins, threshold, shift);
        __syncthreads();
    }
    return threshold;
}

__device__ inline unsigned count_bits(unsigned x) {
    unsigned count = 0;
#pragma unroll
    for (int i = 0; i < TOKENS_PER_THREAD; ++i) count += x >> i & 1;
    return count;
}

// Write the chosen tokens between n_sink and `end`, ascending. Return their number plus n_sink.
__device__ inline i64 write_top_k(
    const Real* scores, i64 n, i64 n_sink, i64 end, Threshold threshold, unsigned* warp_sums,
    i64* selected
) {
    i64 n_equal = 0, n_chosen = n_sink;
    Quad quad = {};
    for (i64 first = 0; first < n; first += (i64)blockDim.x * TOKENS_PER_THREAD) {
        i64 begin = first + (i64)threadIdx.x * TOKENS_PER_THREAD;
        // Bit i: the score of token begin + i equals the threshold, or is above it. Positions past
        // the end of the sequence come last among equal scores, and `end` excludes them.
        unsigned equal = 0, above = 0, total;
#pragma unroll
        for (int i = 0; i < TOKENS_PER_THREAD; ++i) {
            if (i % 4 == 0 && begin + i < n)
                quad = *reinterpret_cast<const Quad*>(scores + begin + i);
            Key key = key_of(quad.x[i % 4]);
            equal |= (unsigned)(key == threshold.key) << i;
            above |= (unsigned)(key > threshold.key) << i;
        }
        i64 rank = n_equal + sum_before(
                                 count_bits(equal), warp_sums, total
                             );  // earlier tokens first among equal scores
        n_equal += total;
        unsigned chosen = above;
#pragma unroll
        for (int i = 0; i < TOKENS_PER_THREAD; ++i)
            if (equal >> i & 1 && rank++ < threshold.n_equal) chosen |= 1u << i;
#pragma unroll
        for (int i = 0; i < TOKENS_PER_THREAD; ++i)
            if (begin + i < n_sink || begin + i >= end) chosen &= ~(1u << i);
        i64 position = n_chosen + sum_before(count_bits(chosen), warp_sums, total);
        n_chosen += total;
#pragma unroll
        for (int i = 0; i < TOKENS_PER_THREAD; ++i)
            if (chosen >> i & 1) selected[position++] = begin + i;
    }
    return n_chosen;
}

extern "C" __global__ __launch_bounds__(1024) void select_tokens(const SelectCall call) {
    unsigned *bins = reinterpret_cast<unsigned*>(shared_memory), *warp_sums = bins + BINS;
    for (i64 row = blockIdx.x; row < call.n_rows; row += gridDim.x) {
        i64 sequence = (call.first_row + row) / call.rows_per_sequence;
        i64 n = call.lengths[sequence];
        i64 budget = call.budgets[sequence] < n ? call.budgets[sequence] : n;
        i64 n_sink = call.sink < n ? call.sink : n;
        i64 window = n - call.window > n_sink ? n - call.window : n_sink;
        const Real* scores = call.scores + row * call.width;
        i64* selected = call.selected + (call.first_row + row) * call.n_selected;
        Threshold threshold = threshold_of(scores, n, budget, bins);
        i64 end = write_top_k(scores, n, n_sink, window, threshold, warp_sums, selected) - window;
        for (i64 t = threadIdx.x; t < n_sink; t += blockDim.x) selected[t] = t;
        for (i64 t = window + threadIdx.x; t < n; t += blockDim.x) selected[end + t] = t;
        for (i64 i = end + n + threadIdx.x; i < call.n_selected; i += blockDim.x) selected[i] = -1;
    }
}
