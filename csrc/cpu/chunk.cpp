/* Compiled once for each instruction set with -DFEWSTEP_CHUNK=chunk_<name>. Everything has internal linkage and nothing comes from the C++
 * library: a shared inline function compiled for one set must never be linked into another. */
#include "chunk.h"
#include "element.h"
#include "noise.h"

namespace {

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
        normals(chunk.seed, chunk.group, chunk.stream, chunk.count, scratch);
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
    double scale = 1.0, values[CHUNK], part[4][CHUNK / 4];
    for (int i = 0; i < bits; ++i) scale *= 0.5;
    for (int64_t g = 0; g < (count + 3) / 4; g += LANES) {
        Words words[4];
        philox(group + (uint64_t)g, stream, seed, words);
        for (int j = 0; j < 4; ++j) {
            const Doubles number_of = number(words[j] >> (32 - bits), 0.0) * scale;
            memcpy(&part[j][g], &number_of, WIDTH);
        }
    }
    for (int64_t g = 0; g < (count + 3) / 4; ++g)
        for (int j = 0; j < 4; ++j) values[4 * g + j] = part[j][g];
    store(values, out, dtype, count);
}

} // namespace

extern const ChunkFunctions FEWSTEP_CHUNK = {lincomb<float>, lincomb<double>, normal, uniform};
