// The subset of CUDA that this project's kernels use, on a CPU: g++ compiles the unmodified kernel
// source behind this header.
//
// Fibers (the default): one system thread runs all CUDA threads of a block in turn. A turn ends at
// a barrier or at a collective operation of a warp (shuffle, vote, tensor-core product). A value
// read before the barrier that should separate write and read is therefore still missing. Barriers
// that not all threads reach in the same way end the process with a message.
//
// With CUDA_ON_CPU_THREADS every CUDA thread is a system thread, for the thread sanitizer. Blocks
// run one after another.
//
// Not supported: inline PTX, cooperative groups, concurrent blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct Dim {
    unsigned x, y, z;
};
static Dim blockIdx, blockDim, gridDim;

constexpr int MAX_THREADS = 1024;
constexpr unsigned WARP = 32;
constexpr size_t SHARED_BYTES = 232448;  // what a block of compute capability 9.0 can have

[[noreturn]] inline void cuda_on_cpu_failed(const char* reason) {
    fprintf(stderr, "cuda_on_cpu: %s\n", reason);
    abort();
}

enum Wait { SYNCTHREADS, SHUFFLE, RETURN };

extern double shared_memory[];

#ifdef CUDA_ON_CPU_THREADS

#include <barrier>
#include <thread>
#include <vector>

static thread_local Dim threadIdx;
static std::barrier<>* cuda_barrier;

// A shuffle waits for its warp by relaxed counting. Only a barrier orders memory, so the thread
// sanitizer reports a missing one.
static unsigned long cuda_shuffles[MAX_THREADS / WARP];

inline void cuda_wait(Wait wait) {
    if (wait == SYNCTHREADS) return cuda_barrier->arrive_and_wait();
    unsigned first = threadIdx.x / WARP * WARP,
             lanes = blockDim.x - first < WARP ? blockDim.x - first : WARP;
    unsigned long* count = cuda_shuffles + first / WARP;
    unsigned long n = __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
    unsigned long all = (n / lanes + 1) * lanes;
    while (__atomic_load_n(count, __ATOMIC_RELAXED) < all) std::this_thread::yield();
}

template <typename Body>
void cuda_run_grid(size_t shared_bytes, const Body& body) {
    std::barrier<> barrier(blockDim.x);
    cuda_barrier = &barrier;
    memset(cuda_shuffles, 0, sizeof cuda_shuffles);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < blockDim.x; ++i)
        threads.emplace_back([i, shared_bytes, &body] {
            threadIdx = Dim{i, 0, 0};
            for (unsigned b = 0; b < gridDim.x; ++b) {
                cuda_wait(SYNCTHREADS);
                if (i == 0) {
                    memset(shared_memory, 0xff, shared_bytes);
                    blockIdx = Dim{b, 0, 0};
                }
                cuda_wait(SYNCTHREADS);
                body();
            }
        });
    for (auto& thread : threads) thread.join();
}

#else

#include <sys/mman.h>

static Dim threadIdx;

constexpr size_t STACK_BYTES = 1 << 18;

struct Fiber {
    void* stack_pointer;
    long n_waits, n_barriers;
    Wait last;
};
static Fiber fibers[MAX_THREADS];
static void* main_stack_pointer;
static void (*fiber_body)();

// Save the callee-saved registers, switch stacks, and continue there.
extern "C" void cuda_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.local cuda_switch
cuda_switch:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
)");
#else
#error "fibers are written for x86-64: define CUDA_ON_CPU_THREADS"
#endif

// The fibers of a warp run in a ring, so all reach their n-th wait before any passes it. At a
// barrier, and at the end, a warp passes control to the next one.
inline void cuda_next(Wait wait) {
    unsigned me = threadIdx.x, first = me / WARP * WARP, next = me + 1 == blockDim.x ? 0 : me + 1;
    if (wait == SHUFFLE && (next == 0 || next == first + WARP)) next = first;
    fibers[me].n_waits += 1;
    fibers[me].n_barriers += wait != SHUFFLE;
    fibers[me].last = wait;
    if ((me > first &&
         (fibers[me].n_waits != fibers[first].n_waits || wait != fibers[first].last)) ||
        (wait != SHUFFLE &&
         (fibers[me].n_barriers != fibers[0].n_barriers || wait != fibers[0].last)))
        cuda_on_cpu_failed(
            "threads of a block wait at different barriers: a barrier in a branch that not all of "
            "them take"
        );
    if (wait == RETURN && next == 0) {
        cuda_switch(&fibers[me].stack_pointer, main_stack_pointer);
        return;
    }
    threadIdx.x = next;
    if (next != me) cuda_switch(&fibers[me].stack_pointer, fibers[next].stack_pointer);
}

inline void cuda_wait(Wait wait) { cuda_next(wait); }

inline void cuda_fiber() {
    fiber_body();
    cuda_next(RETURN);
    cuda_on_cpu_failed("a thread that had returned was called");
}

template <typename Body>
void cuda_run_block(const Body& body) {
    static char* stacks = static_cast<char*>(mmap(
        nullptr, MAX_THREADS * STACK_BYTES, PROT_READ | PROT_WRITE,
        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0
    ));
    static const Body* current;
    current = &body;
    fiber_body = [] { (*current)(); };
    for (unsigned i = 0; i < blockDim.x; ++i) {
        void** top = reinterpret_cast<void**>(stacks + (i + 1) * STACK_BYTES);
        // return address of the fiber's first function
        *--top = nullptr;
        // return address of the first switch
        *--top = reinterpret_cast<void*>(&cuda_fiber);
        // callee-saved registers
        for (int r = 0; r < 6; ++r) *--top = nullptr;
        fibers[i] = Fiber{top, 0, 0, SYNCTHREADS};
    }
    threadIdx = Dim{0, 0, 0};
    cuda_switch(&main_stack_pointer, fibers[0].stack_pointer);
}

template <typename Body>
void cuda_run_grid(size_t shared_bytes, const Body& body) {
    for (unsigned b = 0; b < gridDim.x; ++b) {
        memset(shared_memory, 0xff, shared_bytes);  // NaN: shared memory is uninitialised
        blockIdx = Dim{b, 0, 0};
        cuda_run_block(body);
    }
}

#endif

inline void __syncthreads() { cuda_wait(SYNCTHREADS); }

// Atomic, but no barrier: other threads may rely on the sum only after one.
inline unsigned atomicAdd(unsigned* address, unsigned value) {
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

static double cuda_slots[2][MAX_THREADS];
#ifdef CUDA_ON_CPU_THREADS
static thread_local int cuda_turn;
#else
static int cuda_turns[MAX_THREADS];
#define cuda_turn cuda_turns[threadIdx.x]
#endif

// Two sets of slots in alternation: no thread writes to a set before all have read its previous
// values.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    if (mask != ~0u) cuda_on_cpu_failed("a shuffle among some lanes of a warp only");
    double* slots = cuda_slots[cuda_turn ^= 1];
    double slot = value, received;
    __atomic_store(slots + threadIdx.x, &slot, __ATOMIC_RELAXED);
    cuda_wait(SHUFFLE);
    __atomic_load(slots + (threadIdx.x ^ (unsigned)other), &received, __ATOMIC_RELAXED);
    return (T)received;
}

inline bool __any_sync(unsigned mask, bool holds) {
    if (mask != ~0u) cuda_on_cpu_failed("a vote among some lanes of a warp only");
    double* slots = cuda_slots[cuda_turn ^= 1];
    double mine = holds, other;
    __atomic_store(slots + threadIdx.x, &mine, __ATOMIC_RELAXED);
    cuda_wait(SHUFFLE);
    for (unsigned lane = 0; lane < WARP; ++lane) {
        __atomic_load(slots + threadIdx.x / WARP * WARP + lane, &other, __ATOMIC_RELAXED);
        holds |= other != 0;
    }
    return holds;
}

inline float cuda_bfloat16(unsigned pair, int half) {
    unsigned bits = half == 0 ? pair << 16 : pair & 0xffff0000u;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The least exact addition that tensor cores may have: every term is truncated at the last bit of
// the largest one, and so is the sum. NVIDIA does not document it; published measurements found
// this, with up to two bits more.
inline float cuda_mma_sum(float c, const float (&a)[16], const float (&b)[16]) {
    double terms[17] = {c}, largest = std::fabs((double)c), plain = c;
    for (int k = 0; k < 16; ++k) {
        terms[k + 1] = (double)a[k] * b[k];
        plain += terms[k + 1];
        largest = std::fmax(largest, std::fabs(terms[k + 1]));
    }
    if (largest == 0 || !std::isfinite(plain)) return (float)plain;
    int exponent;
    std::frexp(largest, &exponent);
    double unit = std::ldexp(1.0, exponent - 24), per_unit = 1 / unit;
    long long total = 0;
    for (double term : terms) total += (long long)(term * per_unit);  // truncation towards zero
    double sum = (double)total * unit;
    float rounded = (float)sum;
    return std::fabs((double)rounded) > std::fabs(sum) ? std::nextafterf(rounded, 0) : rounded;
}

// mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32: d = a @ b + d, of 16 x 16, 16 x 8 and 16 x
// 8 numbers. The distribution over lanes is in the PTX ISA, "Matrix Fragments for mma.m16n8k16
// with floating point type". With groupID = lane / 4 and threadID_in_group = lane % 4, for the
// i-th number of a lane (registers of a and b hold two each, the first in the lower half):
//   a  row    groupID for i = 0, 1, 4, 5, else groupID + 8
//      column threadID_in_group * 2 + i % 2, and 8 more for i >= 4
//   b  row    threadID_in_group * 2 + i % 2, and 8 more for i >= 2
//      column groupID
//   d  row    groupID for i < 2, else groupID + 8
//      column threadID_in_group * 2 + i % 2
inline void cuda_mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    static unsigned words[2][MAX_THREADS][6];
    auto all = words[cuda_turn ^= 1];
    for (int r = 0; r < 4; ++r) __atomic_store_n(&all[threadIdx.x][r], a[r], __ATOMIC_RELAXED);
    for (int r = 0; r < 2; ++r) __atomic_store_n(&all[threadIdx.x][4 + r], b[r], __ATOMIC_RELAXED);
    cuda_wait(SHUFFLE);
    unsigned warp = threadIdx.x / WARP * WARP, group = threadIdx.x % WARP / 4,
             thread = threadIdx.x % 4;
    auto of_a = [&](unsigned row, unsigned column) {
        unsigned lane = row % 8 * 4 + column % 8 / 2, i = column % 2 + row / 8 * 2 + column / 8 * 4;
        return cuda_bfloat16(__atomic_load_n(&all[warp + lane][i / 2], __ATOMIC_RELAXED), i % 2);
    };
    auto of_b = [&](unsigned row, unsigned column) {
        unsigned lane = column * 4 + row % 8 / 2, i = row % 2 + row / 8 * 2;
        return cuda_bfloat16(
            __atomic_load_n(&all[warp + lane][4 + i / 2], __ATOMIC_RELAXED), i % 2
        );
    };
    float rows[2][16], columns[2][16];
    for (unsigned k = 0; k < 16; ++k) {
        for (unsigned half = 0; half < 2; ++half) {
            rows[half][k] = of_a(group + 8 * half, k);
            columns[half][k] = of_b(k, thread * 2 + half);
        }
    }
    for (int i = 0; i < 4; ++i) d[i] = cuda_mma_sum(d[i], rows[i / 2], columns[i % 2]);
}

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

template <typename... A, size_t... I>
void cuda_call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
}

template <typename... A>
void cuda_launch(
    void (*kernel)(A...), unsigned grid, unsigned block, size_t shared_bytes, void** arguments
) {
    if (block > MAX_THREADS || shared_bytes > SHARED_BYTES)
        cuda_on_cpu_failed("too many threads or too much shared memory");
    gridDim = Dim{grid, 1, 1};
    blockDim = Dim{block, 1, 1};
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, SHARED_BYTES);
    char* end = reinterpret_cast<char*>(shared_memory) + shared_bytes;
    ASAN_POISON_MEMORY_REGION(end, SHARED_BYTES - shared_bytes);
#endif
    cuda_run_grid(shared_bytes, [&] {
        cuda_call(kernel, arguments, std::index_sequence_for<A...>());
    });
}
