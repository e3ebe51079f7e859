/* One step of an average, for the files compiled once for each instruction set. */
#pragma once
#include "element.h"
#include "multi_tensor.h"
#include "philox_lanes.h"

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
inline void draw_halves(const AverageShare &average, uint64_t element, int64_t count, uint16_t *halves) {
    constexpr uint64_t HALF = 0xFFFF;
    static_assert(TILE / 8 % LANES == 0, "a tile is whole vectors of blocks");
    Words evens, odds;
    for (int64_t i = 0; i < LANES; ++i) evens[i] = (uint64_t)(i / 2 + i % 2 * LANES), odds[i] = evens[i] + LANES / 2;
    for (int64_t g = 0; 8 * g < count; g += LANES) {
        Words w[4];
        philox(element / 8 + (uint64_t)g, average.update, average.seed, w, 1 + average.profile);
        const Words low = (w[0] & HALF) | (w[1] & HALF) << 16 | (w[2] & HALF) << 32 | w[3] << 48; /* of elements 0 to 3 of each block */
        const Words high = w[0] >> 16 | (w[1] >> 16) << 16 | (w[2] >> 16) << 32 | (w[3] >> 16) << 48;
        const Words first = __builtin_shuffle(low, high, evens), second = __builtin_shuffle(low, high, odds);
        memcpy(halves + 8 * g, &first, WIDTH), memcpy(halves + 8 * g + 4 * LANES, &second, WIDTH);
    }
}

/* The step of approach, then rounding up with the probability that makes it unbiased. */
inline void follow_stochastically(const float *parameter, uint16_t *to, const AverageShare &average, uint64_t element, int64_t count) {
    uint16_t halves[TILE];
    draw_halves(average, element, count, halves);
    const float weight = (float)average.weight, rest = 1.0f - weight;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
        const float a = bfloat_to_float(to[i]), step = parameter[i] - a, moved = weight < 0.5f ? a + weight * step : parameter[i] - step * rest;
        uint32_t bits;
        memcpy(&bits, &moved, 4);
        to[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000u ? 0x7FC0 : (bits + halves[i]) >> 16);
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
    if (sizeof(T) == 4 && average.stochastic && average.dtype == FEWSTEP_BFLOAT16) {
        follow_stochastically((const float *)parameter, (uint16_t *)place, average, average.element + (uint64_t)start, count);
        return;
    }
    T part[TILE];
    load(place, average.dtype, part, count);
    approach(part, parameter, (T)average.weight, count);
    store(part, place, average.dtype, count);
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
