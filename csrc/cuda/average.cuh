/* One step of an average on eight neighbouring elements, and the numbers that kernels read on the device. */
#pragma once
#include "element.cuh"
#include "philox.h"

__device__ __forceinline__ double read_scalar(const fewstep_scalar &scalar) {
    if (!scalar.address) return scalar.value;
    switch (scalar.dtype) {
    case FEWSTEP_FLOAT32: return *(const float *)scalar.address;
    case FEWSTEP_FLOAT64: return *(const double *)scalar.address;
    default: return (double)*(const int64_t *)scalar.address;
    }
}

/* element: number of the first of the eight, a multiple of 8 */
__device__ __forceinline__ void store_stochastically(const float *from, void *to, int count, bool vector, uint64_t seed, uint64_t element,
                                                     uint32_t update, uint32_t profile) {
    const PhiloxWords words = philox(element / 8, update, seed, 1 + profile);
    alignas(16) uint16_t part[EIGHT];
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) {
        const uint32_t bits = __float_as_uint(from[i]), random = i < 4 ? words.w[i & 3] & 0xFFFF : words.w[i & 3] >> 16;
        part[i] = (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000u ? 0x7FC0 : (bits + random) >> 16);
    }
    if (vector) *(uint4 *)to = *(const uint4 *)part;
    else {
#pragma unroll
        for (int i = 0; i < EIGHT; ++i)
            if (i < count) ((uint16_t *)to)[i] = part[i];
    }
}

template <class T>
__device__ __forceinline__ void approach(T *average, const T *parameter, T weight) {
    const T rest = (T)1 - weight;
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) {
        const T step = parameter[i] - average[i];
        average[i] = weight < (T)0.5 ? average[i] + weight * step : parameter[i] - step * rest;
    }
}

struct AverageStep {
    double weight;
    bool stochastic;
    uint64_t seed, element;
    uint32_t update, profile;
};

/* place: the average's first of the eight elements */
template <class T>
__device__ __forceinline__ void follow(const T *parameter, void *place, int dtype, int count, bool vector, const AverageStep &step) {
    T average[EIGHT];
    load_eight(place, dtype, average, count, vector);
    approach(average, parameter, (T)step.weight);
    if (sizeof(T) == 4 && step.stochastic && dtype == FEWSTEP_BFLOAT16)
        store_stochastically((const float *)average, place, count, vector, step.seed, step.element, step.update, step.profile);
    else store_eight(average, place, dtype, count, vector);
}
