/* Philox4x32-10 of philox.h in vectors of 64-bit lanes, for the files compiled once for each instruction set. */
#pragma once
#include "element.h"
#include <stdint.h>
#include <string.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

typedef uint64_t Words __attribute__((vector_size(WIDTH))); /* 32-bit words in 64-bit lanes */
constexpr int64_t LANES = WIDTH / 8;

/* The product of the lanes' low halves. */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" /* GCC 12 says it of its own intrinsic */
inline Words product(Words a, uint32_t b) {
    const Words other = (Words{} + b);
#if defined(__AVX512F__)
    return (Words)_mm512_mul_epu32((__m512i)a, (__m512i)other);
#elif defined(__AVX2__)
    return (Words)_mm256_mul_epu32((__m256i)a, (__m256i)other);
#elif defined(__SSE2__)
    return (Words)_mm_mul_epu32((__m128i)a, (__m128i)other);
#else
    return (a & 0xFFFFFFFFull) * other;
#endif
}
#pragma GCC diagnostic pop

/* The four words of groups group, group + 1, ... */
inline void philox(uint64_t group, uint32_t stream, uint64_t seed, Words words[4], uint32_t purpose = 0) {
    static const uint64_t numbers[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    Words c0, c1, c2 = Words{} + stream, c3 = Words{} + purpose;
    memcpy(&c0, numbers, WIDTH);
    c0 += group, c1 = c0 >> 32;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Words p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u); /* what lies above a word is never read */
        c0 = (p1 >> 32) ^ c1 ^ (Words{} + k0), c2 = (p0 >> 32) ^ c3 ^ (Words{} + k1), c1 = p1, c3 = p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    words[0] = c0 & 0xFFFFFFFFull, words[1] = c1 & 0xFFFFFFFFull, words[2] = c2 & 0xFFFFFFFFull, words[3] = c3 & 0xFFFFFFFFull;
}

} // namespace
