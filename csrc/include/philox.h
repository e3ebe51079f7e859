/* Philox4x32-10 and Box-Muller, word for word what kernels/fewstep_kernels/noise.py defines. Compile with FP contraction off:
 * the bits agree because every operation is rounded by itself. */
#ifndef FEWSTEP_PHILOX_H
#define FEWSTEP_PHILOX_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define FEWSTEP_INLINE static __device__ __forceinline__
#else
#define FEWSTEP_INLINE static inline __attribute__((always_inline))
#endif

struct PhiloxWords {
    uint32_t w[4];
};

FEWSTEP_INLINE PhiloxWords philox(uint64_t group, uint32_t stream, uint64_t seed, uint32_t purpose = 0) {
    uint32_t c0 = (uint32_t)group, c1 = (uint32_t)(group >> 32), c2 = stream, c3 = purpose;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1, c3 = (uint32_t)p0, c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return PhiloxWords{{c0, c1, c2, c3}};
}

FEWSTEP_INLINE double word_to_double(uint32_t word) { return (double)(int32_t)(word ^ 0x80000000u) + 2147483648.0; }

/* log((word + 1/2) / 2^32) = e log 2 + 2 atanh(s), s = (m - 1) / (m + 1), m in [sqrt(1/2), sqrt(2)) */
FEWSTEP_INLINE double log_uniform(uint32_t word) {
    double u = (word_to_double(word) + 0.5) * 0x1p-32, m;
    uint64_t bits;
    memcpy(&bits, &u, 8);
    uint64_t biased = (bits - 0x3FE6A09E667F3BCDull + (1023ull << 52)) >> 52;
    bits -= (biased - 1023ull) << 52;
    memcpy(&m, &bits, 8);
    double s = (m - 1.0) / (m + 1.0), q = s * s, p = q * (1.0 / 23) + 1.0 / 21;
    p = p * q + 1.0 / 19;
    p = p * q + 1.0 / 17;
    p = p * q + 1.0 / 15;
    p = p * q + 1.0 / 13;
    p = p * q + 1.0 / 11;
    p = p * q + 1.0 / 9;
    p = p * q + 1.0 / 7;
    p = p * q + 1.0 / 5;
    p = p * q + 1.0 / 3;
    p = p * q + 1.0;
    return (double)((int32_t)biased - 1023) * 0.6931471805599453 + (s + s) * p;
}

/* x / sqrt(x) by Newton's iteration */
FEWSTEP_INLINE double square_root(double x) {
    uint64_t bits;
    double y, half = x * 0.5;
    memcpy(&bits, &x, 8);
    bits = 0x5FE6EB50C7B537A9ull - (bits >> 1);
    memcpy(&y, &bits, 8);
    y = y * (1.5 - half * y * y);
    y = y * (1.5 - half * y * y);
    y = y * (1.5 - half * y * y);
    y = y * (1.5 - half * y * y);
    return x * y;
}

/* (cos, sin) of 2 pi word / 2^32 */
FEWSTEP_INLINE void turn(uint32_t word, double *cosine, double *sine) {
    uint32_t quarter = (word + (1u << 29)) >> 30;
    double angle = (double)(int32_t)(word - (quarter << 30)) * (6.283185307179586 * 0x1p-32), q = angle * angle;
    double s = q * (1.0 / 355687428096000.0) + -1.0 / 1307674368000.0;
    s = s * q + 1.0 / 6227020800.0;
    s = s * q + -1.0 / 39916800.0;
    s = s * q + 1.0 / 362880.0;
    s = s * q + -1.0 / 5040.0;
    s = s * q + 1.0 / 120.0;
    s = s * q + -1.0 / 6.0;
    s = s * q + 1.0;
    s = angle * s;
    double c = q * (-1.0 / 6402373705728000.0) + 1.0 / 20922789888000.0;
    c = c * q + -1.0 / 87178291200.0;
    c = c * q + 1.0 / 479001600.0;
    c = c * q + -1.0 / 3628800.0;
    c = c * q + 1.0 / 40320.0;
    c = c * q + -1.0 / 720.0;
    c = c * q + 1.0 / 24.0;
    c = c * q + -1.0 / 2.0;
    c = c * q + 1.0;
    *cosine = ((quarter & 1) ? s : c) * (1.0 - (double)(int32_t)((quarter + 1) & 2));
    *sine = ((quarter & 1) ? c : s) * (1.0 - (double)(int32_t)(quarter & 2));
}

FEWSTEP_INLINE void box_muller(uint32_t radius_word, uint32_t turn_word, double *first, double *second) {
    double cosine, sine, radius = square_root(log_uniform(radius_word) * -2.0);
    turn(turn_word, &cosine, &sine);
    *first = radius * cosine;
    *second = radius * sine;
}

#endif
