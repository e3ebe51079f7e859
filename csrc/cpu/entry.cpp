/* The exported CPU functions: argument checks, threads, and the choice of instruction set. */
#include "chunk.h"
#include "fewstep_kernels.h"
#include <algorithm>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

namespace {

constexpr int64_t SERIAL = 32768; /* elements below which starting threads costs more than it saves */

constexpr int64_t EMA_CHUNK = 8192; /* parameters stay in the first-level cache from one profile to the next */

struct Choice {
    const ChunkFunctions *functions;
    const char *name;
};

/* FEWSTEP_INSTRUCTIONS=baseline|avx2 asks for less than the processor has, to compare them. */
Choice choose() {
#ifdef FEWSTEP_X86
    const char *given = getenv("FEWSTEP_INSTRUCTIONS");
    const bool baseline = given && !strcmp(given, "baseline"), below512 = given && !strcmp(given, "avx2");
    if (baseline) return {&chunk_baseline, "baseline"};
    __builtin_cpu_init();
    if (!below512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return {&chunk_avx512, "avx512"};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return {&chunk_avx2, "avx2"};
#endif
    return {&chunk_baseline, "baseline"};
}

const Choice chosen = choose();

int64_t item_size(int64_t dtype) { return dtype == FEWSTEP_FLOAT64 ? 8 : dtype == FEWSTEP_FLOAT32 ? 4 : 2; }
bool known(int64_t dtype) { return dtype >= FEWSTEP_FLOAT32 && dtype <= FEWSTEP_FLOAT64; }
int team(int64_t elements, int64_t threads) { return elements < SERIAL || threads < 1 ? 1 : (int)threads; }

/* part(first, last) over [0, total) in contiguous shares. */
template <class Part>
void share(int64_t total, int threads, const Part &part) {
    if (threads == 1) {
        part((int64_t)0, total);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        int64_t n = omp_get_num_threads(), t = omp_get_thread_num();
        part(total * t / n, total * (t + 1) / n);
    }
}

template <class T>
void read_coefficients(const fewstep_coefficients &c, int64_t b, int64_t rows, int64_t columns, T *to) {
    int64_t at = b * c.batch_stride;
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t k = 0; k < columns; ++k) {
            int64_t i = at + m * c.row_stride + k * c.column_stride;
            to[m * columns + k] = c.dtype == FEWSTEP_FLOAT64 ? (T)((const double *)c.data)[i] : (T)((const float *)c.data)[i];
        }
}

template <class T>
void run_lincomb(int64_t inputs, int64_t outputs, int64_t batch, int64_t count, const fewstep_tensor *tensors,
                 const fewstep_coefficients &coefficients, const int64_t *seeds, int64_t stream, int64_t threads) {
    const int64_t columns = inputs + (seeds != nullptr), chunks = (count + CHUNK - 1) / CHUNK;
    share(batch * chunks, team(batch * count, threads), [&](int64_t first, int64_t last) {
        std::vector<T> table(outputs * columns), scratch((inputs + 1 + outputs) * CHUNK);
        LincombChunk chunk;
        chunk.inputs = inputs, chunk.outputs = outputs;
        chunk.coefficients = table.data(), chunk.scratch = scratch.data();
        chunk.noise = seeds != nullptr, chunk.stream = (uint32_t)stream;
        int64_t sample = -1;
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / chunks, start = i % chunks * CHUNK;
            if (b != sample && (sample < 0 || coefficients.batch_stride != 0))
                read_coefficients(coefficients, b, outputs, columns, table.data());
            sample = b;
            chunk.count = std::min(CHUNK, count - start);
            for (int64_t k = 0; k < inputs; ++k) {
                const fewstep_tensor &x = tensors[k];
                chunk.in[k] = (const char *)x.data + (b * x.batch_stride + start) * item_size(x.dtype);
                chunk.in_dtype[k] = (int)x.dtype;
            }
            for (int64_t m = 0; m < outputs; ++m) {
                const fewstep_tensor &y = tensors[inputs + m];
                chunk.out[m] = (char *)y.data + (b * y.batch_stride + start) * item_size(y.dtype);
                chunk.out_dtype[m] = (int)y.dtype;
            }
            if (seeds) chunk.seed = (uint64_t)seeds[b], chunk.group = (uint64_t)start / 4;
            if (sizeof(T) == 4) chosen.functions->lincomb_float(chunk);
            else chosen.functions->lincomb_double(chunk);
        }
    });
}

typedef void (*Draw)(uint64_t, uint64_t, uint32_t, int64_t, void *, int);

int draw(Draw function, const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads) {
    if (batch < 0 || count < 0 || stream < 0 || stream > UINT32_MAX || !known(dtype)) return 1;
    const int64_t chunks = (count + CHUNK - 1) / CHUNK;
    share(batch * chunks, team(8 * batch * count, threads), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / chunks, start = i % chunks * CHUNK;
            function((uint64_t)seeds[b], (uint64_t)start / 4, (uint32_t)stream, std::min(CHUNK, count - start),
                     (char *)out + (b * count + start) * item_size(dtype), (int)dtype);
        }
    });
    return 0;
}

} // namespace

int fewstep_cpu_lincomb(int64_t inputs, int64_t outputs, int64_t batch, int64_t count, const fewstep_tensor *tensors,
                        const fewstep_coefficients *coefficients, const int64_t *seeds, int64_t stream, int64_t threads) {
    if (inputs < 1 || inputs > MOST_INPUTS || outputs < 1 || outputs > MOST_OUTPUTS || batch < 0 || count < 0) return 1;
    if (stream < 0 || stream > UINT32_MAX) return 1;
    if (coefficients->dtype != FEWSTEP_FLOAT32 && coefficients->dtype != FEWSTEP_FLOAT64) return 1;
    bool wide = false;
    for (int64_t i = 0; i < inputs + outputs; ++i) {
        if (!known(tensors[i].dtype)) return 1;
        wide |= i < inputs && tensors[i].dtype == FEWSTEP_FLOAT64;
    }
    if (wide) run_lincomb<double>(inputs, outputs, batch, count, tensors, *coefficients, seeds, stream, threads);
    else run_lincomb<float>(inputs, outputs, batch, count, tensors, *coefficients, seeds, stream, threads);
    return 0;
}

int fewstep_cpu_normal(const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads) {
    return draw(chosen.functions->normal, seeds, batch, count, stream, out, dtype, threads);
}

int fewstep_cpu_uniform(const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads) {
    return draw(chosen.functions->uniform, seeds, batch, count, stream, out, dtype, threads);
}

int fewstep_cpu_ema_update(int64_t tensors, int64_t profiles, const int64_t *table, const double *weights, int64_t threads) {
    if (tensors < 0 || profiles < 1) return 1;
    const int64_t width = 3 + 2 * profiles;
    std::vector<int64_t> starts(tensors + 1); /* first chunk of each tensor */
    int64_t elements = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        const int64_t *row = table + t * width;
        if (!known(row[1]) || row[2] < 0) return 1;
        for (int64_t p = 0; p < profiles; ++p)
            if (!known(row[4 + 2 * p])) return 1;
        starts[t + 1] = starts[t] + (row[2] + EMA_CHUNK - 1) / EMA_CHUNK;
        elements += row[2];
    }
    share(starts[tensors], team(elements, threads), [&](int64_t first, int64_t last) {
        int64_t t = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
        for (int64_t i = first; i < last; ++i) {
            while (i >= starts[t + 1]) ++t;
            const int64_t *row = table + t * width, start = (i - starts[t]) * EMA_CHUNK;
            EmaChunk chunk;
            chunk.parameter = (const char *)row[0] + start * item_size(row[1]);
            chunk.parameter_dtype = (int)row[1];
            chunk.count = std::min(EMA_CHUNK, row[2] - start);
            for (int64_t p = 0; p < profiles; ++p) {
                chunk.average = (char *)row[3 + 2 * p] + start * item_size(row[4 + 2 * p]);
                chunk.average_dtype = (int)row[4 + 2 * p];
                chunk.weight = weights[p];
                chosen.functions->ema(chunk);
            }
        }
    });
    return 0;
}

int fewstep_cpu_inner_products(int64_t left, int64_t right, int64_t batch, int64_t count, const fewstep_tensor *tensors, void *out,
                               int64_t out_dtype, int64_t threads) {
    if (left < 1 || right < 1 || batch < 0 || count < 0) return 1;
    if (out_dtype != FEWSTEP_FLOAT32 && out_dtype != FEWSTEP_FLOAT64) return 1;
    for (int64_t i = 0; i < left + right; ++i)
        if (!known(tensors[i].dtype)) return 1;
    const int64_t chunks = (count + CHUNK - 1) / CHUNK, pairs = left * right;
    std::vector<double> parts(batch * chunks * pairs);
    share(batch * chunks, team(batch * count, threads), [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / chunks, start = i % chunks * CHUNK;
            for (int64_t m = 0; m < left; ++m)
                for (int64_t k = 0; k < right; ++k) {
                    const fewstep_tensor &x = tensors[m], &y = tensors[left + k];
                    parts[i * pairs + m * right + k] = chosen.functions->inner_product(
                        (const char *)x.data + (b * x.batch_stride + start) * item_size(x.dtype), (int)x.dtype,
                        (const char *)y.data + (b * y.batch_stride + start) * item_size(y.dtype), (int)y.dtype, std::min(CHUNK, count - start));
                }
        }
    });
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t p = 0; p < pairs; ++p) {
            double total = 0;
            for (int64_t c = 0; c < chunks; ++c) total += parts[(b * chunks + c) * pairs + p];
            if (out_dtype == FEWSTEP_FLOAT64) ((double *)out)[b * pairs + p] = total;
            else ((float *)out)[b * pairs + p] = (float)total;
        }
    return 0;
}

const char *fewstep_cpu_instructions(void) { return chosen.name; }
int fewstep_cpu_abi(void) { return FEWSTEP_ABI; }
