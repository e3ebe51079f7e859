/* Compiled once for each instruction set with -DFEWSTEP_CHUNK=chunk_<name>. Everything has internal linkage and nothing comes from the C++
 * library: a shared inline function compiled for one set must never be linked into another. */
#include "chunk.h"
#include "fewstep_kernels.h"
#include "philox.h"
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

/* Every input of a vector is read before any output of it is written, so an output may be an input. */
template <class T, int M>
void combine(int64_t inputs, const T *const *in, T *const *out, const T *coefficients, int64_t count) {
    typedef T Vector __attribute__((vector_size(WIDTH)));
    constexpr int64_t LANES = WIDTH / sizeof(T);
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        Vector x, total[M];
        memcpy(&x, in[0] + i, WIDTH);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) total[m] = coefficients[m * inputs] * x;
        for (int64_t k = 1; k < inputs; ++k) {
            memcpy(&x, in[k] + i, WIDTH);
#pragma GCC unroll 4
            for (int m = 0; m < M; ++m) total[m] += coefficients[m * inputs + k] * x;
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) memcpy(out[m] + i, &total[m], WIDTH);
    }
    for (; i < count; ++i) {
        T total[M];
        for (int m = 0; m < M; ++m) {
            total[m] = coefficients[m * inputs] * in[0][i];
            for (int64_t k = 1; k < inputs; ++k) total[m] += coefficients[m * inputs + k] * in[k][i];
        }
        for (int m = 0; m < M; ++m) out[m][i] = total[m];
    }
}

void normals(uint64_t seed, uint64_t group, uint32_t stream, int64_t count, double *out) {
#pragma omp simd
    for (int64_t g = 0; g < (count + 3) / 4; ++g) {
        PhiloxWords words = philox(group + (uint64_t)g, stream, seed);
        box_muller(words.w[0], words.w[1], &out[4 * g], &out[4 * g + 1]);
        box_muller(words.w[2], words.w[3], &out[4 * g + 2], &out[4 * g + 3]);
    }
}

template <class T>
void lincomb(const LincombChunk &chunk) {
    T *scratch = (T *)chunk.scratch;
    const T *in[MOST_INPUTS + 1];
    T *out[MOST_OUTPUTS];
    int64_t inputs = chunk.inputs;
    for (int64_t k = 0; k < inputs; ++k) {
        if (chunk.in_dtype[k] == dtype_of<T>()) {
            in[k] = (const T *)chunk.in[k];
        } else {
            load(chunk.in[k], chunk.in_dtype[k], scratch, chunk.count);
            in[k] = scratch;
            scratch += CHUNK;
        }
    }
    if (chunk.noise) {
        double noise[CHUNK];
        normals(chunk.seed, chunk.group, chunk.stream, chunk.count, noise);
        for (int64_t i = 0; i < chunk.count; ++i) scratch[i] = (T)noise[i];
        in[inputs++] = scratch;
        scratch += CHUNK;
    }
    bool direct[MOST_OUTPUTS];
    for (int64_t m = 0; m < chunk.outputs; ++m) {
        direct[m] = chunk.out_dtype[m] == dtype_of<T>() && chunk.outputs <= 4;
        out[m] = direct[m] ? (T *)chunk.out[m] : scratch + m * CHUNK;
    }
    const T *coefficients = (const T *)chunk.coefficients;
    for (int64_t m = 0; m < chunk.outputs; m += 4) {
        switch (chunk.outputs - m) {
        case 1: combine<T, 1>(inputs, in, out + m, coefficients + m * inputs, chunk.count); break;
        case 2: combine<T, 2>(inputs, in, out + m, coefficients + m * inputs, chunk.count); break;
        case 3: combine<T, 3>(inputs, in, out + m, coefficients + m * inputs, chunk.count); break;
        default: combine<T, 4>(inputs, in, out + m, coefficients + m * inputs, chunk.count);
        }
    }
    for (int64_t m = 0; m < chunk.outputs; ++m)
        if (!direct[m]) store(out[m], chunk.out[m], chunk.out_dtype[m], chunk.count);
}

void normal(uint64_t seed, uint64_t group, uint32_t stream, int64_t count, void *out, int dtype) {
    double values[CHUNK];
    normals(seed, group, stream, count, values);
    store(values, out, dtype, count);
}

void uniform(uint64_t seed, uint64_t group, uint32_t stream, int64_t count, void *out, int dtype) {
    const int bits = dtype == FEWSTEP_FLOAT64 ? 32 : dtype == FEWSTEP_FLOAT32 ? 24 : dtype == FEWSTEP_FLOAT16 ? 11 : 8;
    double scale = 1.0, values[CHUNK];
    for (int i = 0; i < bits; ++i) scale *= 0.5;
#pragma omp simd
    for (int64_t g = 0; g < (count + 3) / 4; ++g) {
        PhiloxWords words = philox(group + (uint64_t)g, stream, seed);
        for (int j = 0; j < 4; ++j) values[4 * g + j] = word_to_double(words.w[j] >> (32 - bits)) * scale;
    }
    store(values, out, dtype, count);
}

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

int64_t bytes(int dtype) { return dtype == FEWSTEP_FLOAT64 ? 8 : dtype == FEWSTEP_FLOAT32 ? 4 : 2; }

template <class T>
void move(const EmaChunk &chunk) {
    const bool plain_parameter = chunk.parameter_dtype == dtype_of<T>(), plain_average = chunk.average_dtype == dtype_of<T>();
    if (plain_parameter && plain_average) {
        approach((T *)chunk.average, (const T *)chunk.parameter, (T)chunk.weight, chunk.count);
        return;
    }
    T parameter_part[CHUNK], average_part[CHUNK];
    for (int64_t start = 0; start < chunk.count; start += CHUNK) {
        const int64_t count = chunk.count - start < CHUNK ? chunk.count - start : CHUNK;
        const char *from = (const char *)chunk.parameter + start * bytes(chunk.parameter_dtype);
        char *to = (char *)chunk.average + start * bytes(chunk.average_dtype);
        if (!plain_parameter) load(from, chunk.parameter_dtype, parameter_part, count);
        if (!plain_average) load(to, chunk.average_dtype, average_part, count);
        T *average = plain_average ? (T *)to : average_part;
        approach(average, plain_parameter ? (const T *)from : parameter_part, (T)chunk.weight, count);
        if (!plain_average) store(average_part, to, chunk.average_dtype, count);
    }
}

void ema(const EmaChunk &chunk) {
    if (chunk.average_dtype == FEWSTEP_FLOAT64) move<double>(chunk);
    else move<float>(chunk);
}

double inner_product(const void *left, int left_dtype, const void *right, int right_dtype, int64_t count) {
    double a[CHUNK], b[CHUNK], lanes[16] = {0};
    load(left, left_dtype, a, count);
    load(right, right_dtype, b, count);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16)
        for (int j = 0; j < 16; ++j) lanes[j] += a[i + j] * b[i + j];
    for (int j = 0; i < count; ++i, ++j) lanes[j] += a[i] * b[i];
    double total = 0;
    for (int j = 0; j < 16; ++j) total += lanes[j];
    return total;
}

} // namespace

extern const ChunkFunctions FEWSTEP_CHUNK = {lincomb<float>, lincomb<double>, normal, uniform, ema, inner_product};
