/* Conversions between the four dtypes, for the files compiled once for each instruction set: internal linkage, nothing from the C++ library
 * (a shared inline function compiled for one set must never be linked into another). */
#pragma once
#include "fewstep_kernels.h"
#include <stdint.h>
#include <string.h>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int WIDTH = 64;
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif

float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, magnitude = (uint32_t)(h & 0x7FFF) << 13, bits;
    if (magnitude >= 0x0F800000u) {
        bits = magnitude | 0x7F800000u;
    } else {
        float scaled;
        memcpy(&scaled, &magnitude, 4);
        scaled *= 0x1p112f;
        memcpy(&bits, &scaled, 4);
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

uint16_t float_to_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    if (magnitude > 0x7F800000u) return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
    if (magnitude >= 0x477FF000u) return (uint16_t)(sign | 0x7C00);
    if (magnitude < 0x38800000u) { /* subnormal result: adding 0.5 rounds at the right bit */
        float shifted;
        memcpy(&shifted, &magnitude, 4);
        shifted += 0.5f;
        memcpy(&magnitude, &shifted, 4);
        return (uint16_t)(sign | (magnitude - 0x3F000000u));
    }
    magnitude += 0xC8000FFFu + (magnitude >> 13 & 1);
    return (uint16_t)(sign | magnitude >> 13);
}

float bfloat_to_float(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000u ? 0x7FC0 : rounded);
}

void halves_to_floats(const uint16_t *from, float *to, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(from + i))));
#endif
    for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

void floats_to_halves(const float *from, uint16_t *to, int64_t count) {
    int64_t i = 0;
#if defined(__F16C__)
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < count; ++i) to[i] = float_to_half(from[i]);
}

template <class T>
void load(const void *from, int dtype, T *to, int64_t count) {
    switch (dtype) {
    case FEWSTEP_FLOAT32:
        for (int64_t i = 0; i < count; ++i) to[i] = (T)((const float *)from)[i];
        break;
    case FEWSTEP_BFLOAT16:
        for (int64_t i = 0; i < count; ++i) to[i] = (T)bfloat_to_float(((const uint16_t *)from)[i]);
        break;
    case FEWSTEP_FLOAT16: {
        float part[64];
        for (int64_t i = 0; i < count; i += 64) {
            int64_t n = count - i < 64 ? count - i : 64;
            halves_to_floats((const uint16_t *)from + i, part, n);
            for (int64_t j = 0; j < n; ++j) to[i + j] = (T)part[j];
        }
        break;
    }
    default:
        for (int64_t i = 0; i < count; ++i) to[i] = (T)((const double *)from)[i];
    }
}

template <class T>
void store(const T *from, void *to, int dtype, int64_t count) {
    switch (dtype) {
    case FEWSTEP_FLOAT32:
        for (int64_t i = 0; i < count; ++i) ((float *)to)[i] = (float)from[i];
        break;
    case FEWSTEP_BFLOAT16:
        for (int64_t i = 0; i < count; ++i) ((uint16_t *)to)[i] = float_to_bfloat((float)from[i]);
        break;
    case FEWSTEP_FLOAT16: {
        float part[64];
        for (int64_t i = 0; i < count; i += 64) {
            int64_t n = count - i < 64 ? count - i : 64;
            for (int64_t j = 0; j < n; ++j) part[j] = (float)from[i + j];
            floats_to_halves(part, (uint16_t *)to + i, n);
        }
        break;
    }
    default:
        for (int64_t i = 0; i < count; ++i) ((double *)to)[i] = (double)from[i];
    }
}

template <class T>
constexpr int dtype_of() { return sizeof(T) == 4 ? FEWSTEP_FLOAT32 : FEWSTEP_FLOAT64; }

inline int64_t item_size(int dtype) { return dtype == FEWSTEP_FLOAT64 ? 8 : dtype == FEWSTEP_FLOAT32 ? 4 : 2; }

} // namespace
