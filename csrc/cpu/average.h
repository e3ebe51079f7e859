/* One step of an average, for the files compiled once for each instruction set. */
#pragma once
#include "element.h"
#include "multi_tensor.h"
#include "philox.h"

namespace {

/* Two vectors of 32 bytes a turn, whatever the set: this streams memory, which 64-byte stores slowed by a tenth (measured on Zen 4). */
template <class T, class Step>
void stream(T *average, const T *parameter, int64_t count, const Step &step) {
    typedef T Vector __attribute__((vector_size(32)));
    constexpr int64_t LANES = 32 / sizeof(T);
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        Vector a, b, p, q;
        memcpy(&a, average + i, 32), memcpy(&b, average + i + LANES, 32);
        memcpy(&p, parameter + i, 32), memcpy(&q, parameter + i + LANES, 32);
        a = step(a, p), b = step(b, q);
        memcpy(average + i, &a, 32), memcpy(average + i + LANES, &b, 32);
    }
    for (; i < count; ++i) average[i] = step(average[i], parameter[i]);
}

template <class T>
void approach(T *average, const T *parameter, T weight, int64_t count) {
    const T rest = (T)1 - weight;
    if (weight < (T)0.5) stream(average, parameter, count, [weight](auto a, auto p) { return a + weight * (p - a); });
    else stream(average, parameter, count, [rest](auto a, auto p) { return p - (p - a) * rest; }); /* exact at weight 1 */
}

/* Sixteen random bits an element: element 8 g + j takes word j % 4 of block g, its low half for j < 4, else its high half. */
inline void round_stochastically(const float *from, uint16_t *to, const AverageShare &average, uint64_t element, int64_t count) {
    uint32_t words[4][TILE / 8], random[TILE];
    const uint64_t first = element / 8, seed = average.seed;
    const uint32_t update = average.update, purpose = 1 + average.profile;
    const int groups = (int)((count + 7) / 8);
#pragma omp simd
    for (int g = 0; g < groups; ++g) {
        const PhiloxWords drawn = philox(first + (uint64_t)g, update, seed, purpose);
        words[0][g] = drawn.w[0], words[1][g] = drawn.w[1], words[2][g] = drawn.w[2], words[3][g] = drawn.w[3];
    }
    for (int g = 0; g < groups; ++g)
        for (int j = 0; j < 4; ++j) random[8 * g + j] = words[j][g] & 0xFFFF, random[8 * g + 4 + j] = words[j][g] >> 16;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        memcpy(&bits, &from[i], 4);
        to[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000u ? 0x7FC0 : (bits + random[i]) >> 16);
    }
}

/* parameter: already of the average's precision T; at most TILE elements, the first being number `start` of the share. */
template <class T>
void follow(const T *parameter, int64_t start, int64_t count, const AverageShare &average) {
    char *place = (char *)average.data + start * item_size(average.dtype);
    if (average.dtype == dtype_of<T>()) {
        approach((T *)place, parameter, (T)average.weight, count);
        return;
    }
    T part[TILE];
    load(place, average.dtype, part, count);
    approach(part, parameter, (T)average.weight, count);
    if (sizeof(T) == 4 && average.stochastic && average.dtype == FEWSTEP_BFLOAT16)
        round_stochastically((const float *)part, (uint16_t *)place, average, average.element + (uint64_t)start, count);
    else store(part, place, average.dtype, count);
}

/* The same from element `start` on, from a parameter of any dtype. */
template <class T>
void follow_any(const void *parameter, int dtype, int64_t start, int64_t count, const AverageShare &average) {
    const char *from = (const char *)parameter + start * item_size(dtype);
    if (dtype == dtype_of<T>()) {
        follow((const T *)from, start, count, average);
        return;
    }
    T part[TILE];
    load(from, dtype, part, count);
    follow((const T *)part, start, count, average);
}

/* In double for double averages, else in float. */
inline void follow_in_precision(const void *parameter, int dtype, int64_t start, int64_t count, const AverageShare &average) {
    if (average.dtype == FEWSTEP_FLOAT64) follow_any<double>(parameter, dtype, start, count, average);
    else follow_any<float>(parameter, dtype, start, count, average);
}

} // namespace
