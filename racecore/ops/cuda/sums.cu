// Prefix sums over segments in float64 and in the order of the segments, so the bits do not depend
// on the distribution of segments over blocks. One thread per column; launched by `scan_segments`
// of racecore/ops/cuda/call.py.
#include "cuda/warp.cuh"

// Segments loaded in advance, to hide the latency of global memory.
constexpr int PREFETCH = 8;

// parts [n, heads * repeats, width], carry [n_sequences, heads, width]. Add up `repeats` adjacent
// parts, store the sum of everything before them in the first of them, and advance the carry of
// their sequence. One thread has one column of one head.
extern "C" __global__ void scan_segments(
    const i64* sequences, double* parts, double* carry, i64 n, i64 heads, i64 repeats, i64 width,
    i64 reverse
) {
    i64 column = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= heads * width) return;
    i64 head = column / width;
    i64 offset = head * repeats * width + column % width;
    i64 step = heads * repeats * width;
    i64 sequence = -1;  // the parts of a sequence are contiguous
    double total = 0;
    for (i64 first = 0; first < n; first += PREFETCH) {
        double sums[PREFETCH];
#pragma unroll
        for (int j = 0; j < PREFETCH; ++j) {
            if (first + j >= n) continue;
            const double* part = parts + (reverse ? n - 1 - first - j : first + j) * step + offset;
            sums[j] = part[0];
            for (i64 r = 1; r < repeats; ++r) sums[j] += part[r * width];
        }
#pragma unroll
        for (int j = 0; j < PREFETCH; ++j) {
            if (first + j >= n) continue;
            i64 i = reverse ? n - 1 - first - j : first + j;
            if (sequences[i] != sequence) {
                if (sequence >= 0) carry[sequence * heads * width + column] = total;
                sequence = sequences[i];
                total = carry[sequence * heads * width + column];
            }
            parts[i * step + offset] = total;
            total += sums[j];
        }
    }
    if (sequence >= 0) carry[sequence * heads * width + column] = total;
}
