/* One step of an average, for the files compiled once for each instruction set. */
#pragma once
#include "element.h"
#include "multi_tensor.h"
#include "philox.h"

namespace {

template <class T>
void approach(T *average, const T *parameter, T weight, int64_t count) {
    const T rest = (T)1 - weight;
    if (weight < (T)0.5) {
#pragma GCC ivdep
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) average[i] += weight * (parameter[i] - average[i]);
    } else { /* exact at weight 1 */
#pragma GCC ivdep
#pragma GCC unroll 4
        for (int64_t i = 0; i < count; ++i) average[i] = parameter[i] - (parameter[i] - average[i]) * rest;
    }
}

/* Sixteen random bits an element: element 8 g + j takes word j % 4 of block g, its low half for j < 4, else its high half. */
inline void round_stochastically(const float *from, uint16_t *to, const AverageShare &average, uint64_t element, int64_t count) {
    uint32_t random[TILE];
#pragma omp simd
    for (int64_t g = 0; g < (count + 7) / 8; ++g) {
        PhiloxWords words = philox(element / 8 + (uint64_t)g, average.update, average.seed, 1 + average.profile);
        for (int j = 0; j < 4; ++j) random[8 * g + j] = words.w[j] & 0xFFFF, random[8 * g + 4 + j] = words.w[j] >> 16;
    }
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
