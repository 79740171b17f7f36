// From the tables of a query to the tokens that it attends to: scores of all keys, and the best of them in their order.
// What goes over codes and scores is here, what goes over rows is in kernels.cu; see reference.py for both in plain NumPy.
#include "cuda/warp.cuh"

constexpr int BLOCK_TOKENS = 64;  // of a block of codes, see layout.py: a warp takes one, a lane two tokens of it
constexpr int HEADS = 4;          // that look up the codes of a token while it is in registers
constexpr int BINS = 256;         // values of a digit of a score
constexpr int RUN = 8;            // tokens of a thread that writes numbers of tokens
constexpr int QUADS = 4;          // loads that a thread which counts has under way

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

// Scores. Eight bytes each: racecore.ops.socket.cuda builds the same structure.
struct Scoring {
    const Real* tables;           // [B, H, L, N, 16]
    const unsigned char* codes;   // [B, G, room, rows, 64]
    const unsigned short* norms;  // [B, G, room * 64]
    const i64* lengths;           // [B]
    Real* out;                    // [n_pairs, group, width], or [n_pairs, width] where the heads of a group are summed
    i64 first_pair, n_pairs;      // sequence and key/value head
    i64 n_heads, n_kv_heads, n_tables, n_digits, high_bits, multiplies, room, code_rows, width;
    i64 share;           // blocks of codes that are scored with the same copy of the tables
    i64 heads_at_once;   // HEADS, or fewer if the tables of so many do not fit shared memory
    i64 has_copies;      // whether those of one fit
    i64 adds_heads;
};

struct alignas(2 * sizeof(Real)) Two {
    Real x[2];
};

#ifdef __CUDA_ARCH__  // never fused with an addition, so that the sum of a group is that of its heads' scores
__device__ inline float product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double product(double x, double y) { return __dmul_rn(x, y); }
#else
__device__ inline Real product(Real x, Real y) { return x * y; }
#endif

// The number that 16 bits stand for: 6 of exponent, 10 of fraction.
__device__ inline Real norm_of(unsigned short norm) {
    union {
        unsigned bits;
        float value;
    } wide = {norm == 0 ? 0u : ((unsigned)norm << 13) + ((127u - 32u) << 23)};
    return wide.value;
}

// totals[head][token] = sum over tables of what a token's code is worth, for the two tokens of a lane; `n` heads.
template <int DIGITS, bool MULTIPLIES>
__device__ inline void collide(
    const Scoring& call, const unsigned char* codes, const Real* tables, int n, Real (&totals)[HEADS][2]) {
    const unsigned short* pairs = reinterpret_cast<const unsigned short*>(codes) + lane_of_warp();
    int n_tables = (int)call.n_tables;
#pragma unroll 4
    for (int table = 0; table < n_tables; ++table) {
        unsigned pair = pairs[table * (BLOCK_TOKENS / 2)], code[2] = {pair & 0xff, pair >> 8};
        if constexpr (DIGITS > 2) {  // bits of the next tables may come along: no entry depends on them
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
                Real worth = entries[code[i] & 15];
#pragma unroll
                for (int digit = 1; digit < DIGITS; ++digit) {
                    Real entry = entries[digit * 16 + (code[i] >> 4 * digit & 15)];
                    worth = MULTIPLIES ? worth * entry : worth + entry;
                }
                totals[h][i] += worth;
            }
        }
    }
}

__device__ inline void collide(
    const Scoring& call, const unsigned char* codes, const Real* tables, int n, Real (&totals)[HEADS][2]) {
    switch (call.n_digits * 2 + call.multiplies) {
        case 4: return collide<2, false>(call, codes, tables, n, totals);
        case 5: return collide<2, true>(call, codes, tables, n, totals);
        case 6: return collide<3, false>(call, codes, tables, n, totals);
        case 7: return collide<3, true>(call, codes, tables, n, totals);
        case 8: return collide<4, false>(call, codes, tables, n, totals);
        default: return collide<4, true>(call, codes, tables, n, totals);
    }
}

// Write scores of a block of codes for heads first_head ... first_head + n - 1 of a group.
__device__ inline void score_block(
    const Scoring& call, i64 pair, i64 block, const Real* tables, int first_head, int n) {
    i64 t = block * BLOCK_TOKENS + 2 * lane_of_warp(), length = call.lengths[pair / call.n_kv_heads];
    Real totals[HEADS][2] = {}, norms[2] = {};
    if (block * BLOCK_TOKENS < length) {
        collide(call, call.codes + (pair * call.room + block) * call.code_rows * BLOCK_TOKENS, tables, n, totals);
        const unsigned short* place = call.norms + pair * call.room * BLOCK_TOKENS + t;
        for (int i = 0; i < 2; ++i) norms[i] = norm_of(place[i]);
    }
    i64 group = call.n_heads / call.n_kv_heads, row = pair - call.first_pair;
    Number infinity = {Bits<sizeof(Real)>::INFINITE};
    Two sum = {};
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
        if (h >= n) continue;
        i64 own = call.adds_heads ? row : row * group + first_head + h;
        Two* place = reinterpret_cast<Two*>(call.out + own * call.width + t);
        if (call.adds_heads && h == 0 && first_head > 0) sum = *place;
        Two score;
        for (int i = 0; i < 2; ++i) {
            score.x[i] = t + i < length ? product(totals[h][i], norms[i]) : -infinity.value;
            sum.x[i] = first_head + h == 0 ? score.x[i] : sum.x[i] + score.x[i];
        }
        if (!call.adds_heads || h == n - 1) *place = call.adds_heads ? sum : score;
    }
}

// A block takes a share of a pair's blocks of codes, its warps one after the other of these.
extern "C" __global__ __launch_bounds__(128) void score_keys(const Scoring call) {
    Real* copies = reinterpret_cast<Real*>(shared_memory);
    int group = (int)(call.n_heads / call.n_kv_heads);
    i64 n_blocks = call.width / BLOCK_TOKENS, n_shares = (n_blocks + call.share - 1) / call.share;
    i64 numbers = call.n_tables * call.n_digits * 16;  // of a head
    for (i64 task = blockIdx.x; task < call.n_pairs * n_shares; task += gridDim.x) {
        i64 pair = call.first_pair + task / n_shares, first = task % n_shares * call.share;
        i64 last = first + call.share < n_blocks ? first + call.share : n_blocks;
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

// The best. A block takes a row of scores. As integers that order as the scores do, the last one wanted is found digit by
// digit: how often every digit occurs among the scores that agree with it so far is counted, and these are integers, so the
// order in which they are added does not matter.
struct Selection {
    const Real* scores;  // [n_rows, width]
    const i64* lengths;  // [B]
    const i64* budgets;  // [B]
    i64* selected;       // [all rows, n_selected]
    i64 first_row, n_rows, rows_per_sequence, width, sink, window, n_selected;
};

// Of the key of the last score that is wanted, and how many of those equal to it are.
struct Limit {
    Key key;
    i64 n_equal;
};

// -0 is 0, and NaN infinity.
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

// Count the digits at `shift` of all keys that have the digits of `limit` above it.
__device__ inline void count_digits(const Real* scores, i64 n, Key limit, int shift, unsigned* bins) {
    unsigned count = 0, last = 0;  // of equal digits in a row: additions to one place wait for each other
    int step = (int)blockDim.x * 4;
    for (i64 first = 0; first < n; first += step * QUADS) {
        int left = (int)(n - first < step * QUADS ? n - first : step * QUADS);  // from here on everything is near
        Quad quads[QUADS];
#pragma unroll
        for (int i = 0; i < QUADS; ++i) {
            int place = i * step + (int)threadIdx.x * 4;
            if (place < left) quads[i] = *reinterpret_cast<const Quad*>(scores + first + place);
        }
#pragma unroll
        for (int j = 0; j < 4 * QUADS; ++j) {
            if (j / 4 * step + (int)threadIdx.x * 4 + j % 4 >= left) continue;
            Key key = key_of(quads[j / 4].x[j % 4]);
            if (shift + 8 < KEY_BITS && key >> (shift + 8) != limit >> (shift + 8)) continue;
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

// The sum of x over the lanes before this one, and over all of a warp.
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

// Likewise for the threads of a block; needs a number of shared memory for each of its warps.
__device__ inline unsigned sum_before(unsigned x, unsigned* room, unsigned& total) {
    unsigned of_warp, before = sum_before(x, of_warp);
    if (lane_of_warp() == 0) room[warp_of_block()] = of_warp;
    __syncthreads();
    total = 0;
    for (int warp = 0; warp < n_warps(); ++warp) {
        if (warp < warp_of_block()) before += room[warp];
        total += room[warp];
    }
    __syncthreads();
    return before;
}

// Choose the digit at `shift`, the largest that leaves few enough above. Every warp does so for itself.
__device__ inline Limit narrowed(const unsigned* bins, Limit limit, int shift) {
    constexpr int OWN = BINS / LANES;
    const unsigned* own = bins + BINS - 1 - lane_of_warp() * OWN;  // and down from there
    unsigned sum = 0, total;
    for (int i = 0; i < OWN; ++i) sum += own[-i];
    i64 above = sum_before(sum, total);
    unsigned digit = 0, left = 0;
    if (above < limit.n_equal && limit.n_equal <= above + sum) {  // in one lane
        int i = 0;
        for (; above + own[-i] < limit.n_equal; ++i) above += own[-i];
        digit = BINS - 1 - lane_of_warp() * OWN - i;
        left = (unsigned)(limit.n_equal - above);
    }
    for (int step = 1; step < LANES; step *= 2) {
        digit += __shfl_xor_sync(~0u, digit, step);
        left += __shfl_xor_sync(~0u, left, step);
    }
    return Limit{limit.key | (Key)digit << shift, left};
}

__device__ inline Limit limit_of(const Real* scores, i64 n, i64 budget, unsigned* bins) {
    if (budget == 0) return Limit{~(Key)0, 0};  // no key is as large
    Limit limit = {0, budget};
    for (int shift = KEY_BITS - 8; shift >= 0; shift -= 8) {
        for (int i = (int)threadIdx.x; i < BINS; i += (int)blockDim.x) bins[i] = 0;
        __syncthreads();
        count_digits(scores, n, limit.key, shift, bins);
        __syncthreads();
        limit = narrowed(bins, limit, shift);
        __syncthreads();
    }
    return limit;
}

__device__ inline unsigned count_bits(unsigned x) {
    unsigned count = 0;
#pragma unroll
    for (int i = 0; i < RUN; ++i) count += x >> i & 1;
    return count;
}

// Write the chosen tokens from n_sink to the one before `end`; return how many there are, those of the sink included.
__device__ inline i64 write_best(
    const Real* scores, i64 n, i64 n_sink, i64 end, Limit limit, unsigned* room, i64* selected) {
    i64 n_equal = 0, n_chosen = n_sink;
    Quad quad = {};
    for (i64 first = 0; first < n; first += (i64)blockDim.x * RUN) {
        i64 begin = first + (i64)threadIdx.x * RUN;
        unsigned equal = 0, above = 0, total;  // bit i: the score of token begin + i is; those behind the end come last
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (i % 4 == 0 && begin + i < n) quad = *reinterpret_cast<const Quad*>(scores + begin + i);
            Key key = key_of(quad.x[i % 4]);
            equal |= (unsigned)(key == limit.key) << i;
            above |= (unsigned)(key > limit.key) << i;
        }
        i64 rank = n_equal + sum_before(count_bits(equal), room, total);  // of equal ones the earlier
        n_equal += total;
        unsigned takes = above;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (equal >> i & 1 && rank++ < limit.n_equal) takes |= 1u << i;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (begin + i < n_sink || begin + i >= end) takes &= ~(1u << i);
        i64 place = n_chosen + sum_before(count_bits(takes), room, total);
        n_chosen += total;
#pragma unroll
        for (int i = 0; i < RUN; ++i)
            if (takes >> i & 1) selected[place++] = begin + i;
    }
    return n_chosen;
}

extern "C" __global__ __launch_bounds__(1024) void select_tokens(const Selection call) {
    unsigned *bins = reinterpret_cast<unsigned*>(shared_memory), *room = bins + BINS;
    for (i64 row = blockIdx.x; row < call.n_rows; row += gridDim.x) {
        i64 sequence = (call.first_row + row) / call.rows_per_sequence;
        i64 n = call.lengths[sequence], budget = call.budgets[sequence] < n ? call.budgets[sequence] : n;
        i64 n_sink = call.sink < n ? call.sink : n, window = n - call.window > n_sink ? n - call.window : n_sink;
        const Real* scores = call.scores + row * call.width;
        i64* selected = call.selected + (call.first_row + row) * call.n_selected;
        Limit limit = limit_of(scores, n, budget, bins);
        i64 end = write_best(scores, n, n_sink, window, limit, room, selected) - window;
        for (i64 t = threadIdx.x; t < n_sink; t += blockDim.x) selected[t] = t;
        for (i64 t = window + threadIdx.x; t < n; t += blockDim.x) selected[end + t] = t;
        for (i64 i = end + n + threadIdx.x; i < call.n_selected; i += blockDim.x) selected[i] = -1;
    }
}
