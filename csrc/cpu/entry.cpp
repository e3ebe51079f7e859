/* The exported CPU functions: argument checks, threads, and the choice of instruction set. */
#include "chunk.h"
#include "overlap.h"
#include "team.h"
#include <algorithm>
#include <memory>
#include <stdlib.h>
#include <string.h>
#include <vector>

/* FEWSTEP_INSTRUCTIONS=baseline|avx2 asks for less than the processor has, to compare them. */
static int choose() {
#ifdef FEWSTEP_X86
    const char *given = getenv("FEWSTEP_INSTRUCTIONS");
    const bool baseline = given && !strcmp(given, "baseline"), below512 = given && !strcmp(given, "avx2");
    if (baseline) return 0;
    __builtin_cpu_init();
    if (!below512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
    return 0;
}

int instruction_set() {
    static const int chosen = choose();
    return chosen;
}

namespace {

const ChunkFunctions &functions = FEWSTEP_CHOOSE(chunk);

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
    int64_t rooms = seeds != nullptr; /* chunks of scratch: for noise, inputs and outputs that are not T where they lie */
    bool aside = outputs > 4;
    for (int64_t i = 0; i < inputs + outputs; ++i) {
        if (item_size(tensors[i].dtype) != (int64_t)sizeof(T)) {
            rooms += i < inputs;
            aside |= i >= inputs;
        }
    }
    if (aside) rooms += outputs;
    share(batch * chunks, team(batch * count, threads), [&](int64_t first, int64_t last) {
        std::vector<T> table(outputs * columns);
        const std::unique_ptr<T[]> scratch(new T[rooms * CHUNK]);
        LincombChunk chunk;
        chunk.inputs = inputs, chunk.outputs = outputs;
        chunk.coefficients = table.data(), chunk.scratch = scratch.get();
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
            if (sizeof(T) == 4) functions.lincomb_float(chunk);
            else functions.lincomb_double(chunk);
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

int fewstep_cpu_lincomb(const fewstep_lincomb *job, int64_t threads) {
    const int64_t inputs = job->inputs, outputs = job->outputs, batch = job->batch, count = job->count, stream = job->noise_stream;
    if (inputs < 1 || inputs > MOST_INPUTS || outputs < 1 || outputs > MOST_OUTPUTS || batch < 0 || count < 0) return 1;
    if (stream < 0 || stream > UINT32_MAX) return 1;
    if (job->coefficients.dtype != FEWSTEP_FLOAT32 && job->coefficients.dtype != FEWSTEP_FLOAT64) return 1;
    const fewstep_tensor *tensors = job->tensors;
    bool wide = false;
    for (int64_t i = 0; i < inputs + outputs; ++i) {
        if (!known(tensors[i].dtype)) return 1;
        wide |= i < inputs && tensors[i].dtype == FEWSTEP_FLOAT64;
    }
    if (fewstep_overlaps(*job)) return FEWSTEP_OVERLAP;
    if (wide) run_lincomb<double>(inputs, outputs, batch, count, tensors, job->coefficients, (const int64_t *)job->seeds, stream, threads);
    else run_lincomb<float>(inputs, outputs, batch, count, tensors, job->coefficients, (const int64_t *)job->seeds, stream, threads);
    return 0;
}

int fewstep_cpu_normal(const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads) {
    return draw(functions.normal, seeds, batch, count, stream, out, dtype, threads);
}

int fewstep_cpu_uniform(const int64_t *seeds, int64_t batch, int64_t count, int64_t stream, void *out, int64_t dtype, int64_t threads) {
    return draw(functions.uniform, seeds, batch, count, stream, out, dtype, threads);
}

const char *fewstep_cpu_instructions(void) {
    static const char *const names[] = {"baseline", "avx2", "avx512"};
    return names[instruction_set()];
}
int fewstep_cpu_abi(void) { return FEWSTEP_ABI; }
