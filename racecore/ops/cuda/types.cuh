// The four storage dtypes (float16, bfloat16, float32, float64), their conversions, and the
// elementary functions in both precisions. Written without NVIDIA's headers, which not every
// installation has.
#pragma once

struct Half {
    unsigned short bits;
};
struct Bfloat {
    unsigned short bits;
};

__device__ inline float to_real(float x) { return x; }
__device__ inline double to_real(double x) { return x; }
__device__ inline float to_stored(float x, float) { return x; }
__device__ inline double to_stored(double x, double) { return x; }

__device__ inline float to_real(Bfloat x) {
    union {
        unsigned bits;
        float value;
    } number = {(unsigned)x.bits << 16};
    return number.value;
}

// Round to nearest, ties to even; NaN stays NaN (0x7fc0 is the quiet one).
__device__ inline Bfloat to_stored(float x, Bfloat) {
    union {
        float value;
        unsigned bits;
    } number = {x};
    unsigned rounded = (number.bits + 0x7fff + (number.bits >> 16 & 1)) >> 16;
    return Bfloat{(unsigned short)(x == x ? rounded : 0x7fc0)};
}

#ifdef __CUDA_ARCH__
__device__ inline float to_real(Half x) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}

__device__ inline Half to_stored(float x, Half) {
    Half rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
}
#else  // plain C++ twin of the inline PTX, for tests on a CPU
__device__ inline float to_real(Half x) {
    union {
        unsigned short bits;
        _Float16 value;
    } number = {x.bits};
    return (float)number.value;
}

__device__ inline Half to_stored(float x, Half) {
    union {
        _Float16 value;
        unsigned short bits;
    } number = {(_Float16)x};
    return Half{number.bits};
}
#endif

__device__ inline float power_of_e(float x) { return expf(x); }
__device__ inline double power_of_e(double x) { return exp(x); }
__device__ inline float tangent(float x) { return tanhf(x); }
__device__ inline double tangent(double x) { return tanh(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }
