/* philox.h in vectors of 64-bit lanes, for the files compiled once for each instruction set. The same operations in the same order, or exact
 * ones in their place (integers of 32 bits become doubles through the mantissa, +-1 times x is a flip of its sign), so the bits are the same. */
#pragma once
#include "chunk.h"
#include "philox_lanes.h"
#include <string.h>

namespace {

typedef double Doubles __attribute__((vector_size(WIDTH)));
static_assert(CHUNK / 4 % LANES == 0, "a chunk is whole vectors of groups");

inline Doubles as_doubles(Words x) { return (Doubles)x; } /* the bits */
inline Words as_words(Doubles x) { return (Words)x; }

/* word - offset, exactly, for words below 2^32. */
inline Doubles number(Words word, double offset) { return as_doubles(word | 0x4330000000000000ull) - (0x1p52 + offset); }

inline Doubles log_uniform(Words word) {
    const Doubles u = (number(word, 0.0) + 0.5) * 0x1p-32;
    Words bits = as_words(u);
    const Words biased = (bits - 0x3FE6A09E667F3BCDull + (1023ull << 52)) >> 52;
    bits -= (biased - 1023ull) << 52;
    const Doubles m = as_doubles(bits), s = (m - 1.0) / (m + 1.0), q = s * s;
    Doubles p = q * (1.0 / 23) + 1.0 / 21;
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
    return number(biased, 1023.0) * 0.6931471805599453 + (s + s) * p;
}

inline Doubles square_root(Doubles x) {
    const Doubles half = x * 0.5;
    Doubles y = as_doubles(0x5FE6EB50C7B537A9ull - (as_words(x) >> 1));
    y = y * (1.5 - half * y * y);
    y = y * (1.5 - half * y * y);
    y = y * (1.5 - half * y * y);
    y = y * (1.5 - half * y * y);
    return x * y;
}

inline void turn(Words word, Doubles *cosine, Doubles *sine) {
    const Words quarter = ((word + (1ull << 29)) & 0xFFFFFFFFull) >> 30; /* of four; the angle is within an eighth of it */
    const Words rest = (word - (quarter << 30) + 0x80000000ull) & 0xFFFFFFFFull;
    const Doubles angle = number(rest, 0x1p31) * (6.283185307179586 * 0x1p-32), q = angle * angle;
    Doubles s = q * (1.0 / 355687428096000.0) + -1.0 / 1307674368000.0;
    s = s * q + 1.0 / 6227020800.0;
    s = s * q + -1.0 / 39916800.0;
    s = s * q + 1.0 / 362880.0;
    s = s * q + -1.0 / 5040.0;
    s = s * q + 1.0 / 120.0;
    s = s * q + -1.0 / 6.0;
    s = s * q + 1.0;
    s = angle * s;
    Doubles c = q * (-1.0 / 6402373705728000.0) + 1.0 / 20922789888000.0;
    c = c * q + -1.0 / 87178291200.0;
    c = c * q + 1.0 / 479001600.0;
    c = c * q + -1.0 / 3628800.0;
    c = c * q + 1.0 / 40320.0;
    c = c * q + -1.0 / 720.0;
    c = c * q + 1.0 / 24.0;
    c = c * q + -1.0 / 2.0;
    c = c * q + 1.0;
    const Words odd = Words{} - (quarter & 1), a = as_words(c), b = as_words(s), differ = (a ^ b) & odd;
    *cosine = as_doubles(a ^ differ ^ (((quarter + 1) & 2) << 62));
    *sine = as_doubles(b ^ differ ^ ((quarter & 2) << 62));
}

/* count <= CHUNK numbers from the first of a group on; may write up to the next multiple of four. Pass by pass over the chunk: each is
 * one short chain of dependent operations, so that a processor has several vectors of it in flight. */
template <class T>
void normals(uint64_t seed, uint64_t group, uint32_t stream, int64_t count, T *out) {
    constexpr int64_t MOST = CHUNK / 4 / LANES;
    Words words[4][MOST];
    const int64_t groups = (count + 3) / 4, vectors = (groups + LANES - 1) / LANES;
    for (int64_t v = 0; v < vectors; ++v) {
        Words four[4];
        philox(group + (uint64_t)(v * LANES), stream, seed, four);
        for (int j = 0; j < 4; ++j) words[j][v] = four[j];
    }
    for (int j = 0; j < 4; j += 2) {
        for (int64_t v = 0; v < vectors; ++v) words[j][v] = as_words(log_uniform(words[j][v]) * -2.0);
        for (int64_t v = 0; v < vectors; ++v) words[j][v] = as_words(square_root(as_doubles(words[j][v])));
        for (int64_t v = 0; v < vectors; ++v) {
            Doubles cosine, sine;
            const Doubles radius = as_doubles(words[j][v]);
            turn(words[j + 1][v], &cosine, &sine);
            words[j][v] = as_words(radius * cosine), words[j + 1][v] = as_words(radius * sine);
        }
    }
    double part[4][CHUNK / 4];
    memcpy(part, words, sizeof part);
    for (int64_t g = 0; g < groups; ++g)
        for (int j = 0; j < 4; ++j) out[4 * g + j] = (T)part[j][g];
}

} // namespace
