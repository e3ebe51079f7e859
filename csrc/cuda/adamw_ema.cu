/* adamw_ema_step on a GPU: a small kernel advances the steps and computes the bias corrections, then one pass over up to TENSORS tensors;
 * lr, gradient scale, guard and decays are read on the device. Compiled for sm_80, sm_90 and sm_100; NOT YET RUN on a GPU. */
#include "average.cuh"
#include <algorithm>
#include <string.h>

namespace {

constexpr int TENSORS = 256, PROFILES = 4;
constexpr int64_t BLOCK = THREADS * EIGHT;
enum { LR, BETA1, BETA2, EPSILON, GRADIENT_SCALE, GUARD, UPDATE, DECAYS };

struct Row {
    int64_t count, origin, weight_decay, parameter, parameter_dtype, gradient, gradient_dtype, exp_avg, exp_avg_dtype, exp_avg_sq,
        exp_avg_sq_dtype, step, step_dtype, working, working_dtype;
};
constexpr int64_t ROW = sizeof(Row) / sizeof(int64_t);

struct Table {
    void *parameter[TENSORS], *exp_avg[TENSORS], *exp_avg_sq[TENSORS], *step[TENSORS], *working[TENSORS];
    const void *gradient[TENSORS];
    void *average[PROFILES][TENSORS];
    int64_t count[TENSORS], origin[TENSORS];
    unsigned first[TENSORS + 1]; /* a tensor's first block */
    double weight_decay[TENSORS];
    uint8_t parameter_dtype[TENSORS], gradient_dtype[TENSORS], exp_avg_dtype[TENSORS], exp_avg_sq_dtype[TENSORS], step_dtype[TENSORS],
        working_dtype[TENSORS], average_dtype[PROFILES][TENSORS], vector[TENSORS];
    fewstep_scalar scalars[DECAYS + PROFILES];
    double *corrections; /* two for each tensor */
    uint64_t seed;
    int tensors, profiles;
    bool stochastic;
};
static_assert(sizeof(Table) <= 32764, "a kernel's parameters hold at most 32764 bytes");

__global__ void __launch_bounds__(TENSORS) advance_kernel(const __grid_constant__ Table table) {
    const int t = threadIdx.x;
    if (t >= table.tensors || !table.gradient[t] || !isfinite(read_scalar(table.scalars[GUARD]))) return;
    double step;
    if (table.step_dtype[t] == FEWSTEP_FLOAT64) step = *(double *)table.step[t] += 1.0;
    else step = *(float *)table.step[t] += 1.0f;
    table.corrections[2 * t] = read_scalar(table.scalars[LR]) / (1.0 - pow(read_scalar(table.scalars[BETA1]), step));
    table.corrections[2 * t + 1] = 1.0 / sqrt(1.0 - pow(read_scalar(table.scalars[BETA2]), step));
}

__device__ __forceinline__ float root(float x) { return __fsqrt_rn(x); }
__device__ __forceinline__ double root(double x) { return __dsqrt_rn(x); }

template <class T>
__device__ __forceinline__ void adamw(const Table &table, int t, int64_t start, int count, bool vector) {
    T parameter[EIGHT], gradient[EIGHT], first[EIGHT], second[EIGHT];
    char *parameter_place = (char *)table.parameter[t] + start * item_size(table.parameter_dtype[t]);
    char *first_place = (char *)table.exp_avg[t] + start * item_size(table.exp_avg_dtype[t]);
    char *second_place = (char *)table.exp_avg_sq[t] + start * item_size(table.exp_avg_sq_dtype[t]);
    load_eight(parameter_place, table.parameter_dtype[t], parameter, count, vector);
    load_eight((const char *)table.gradient[t] + start * item_size(table.gradient_dtype[t]), table.gradient_dtype[t], gradient, count, vector);
    load_eight(first_place, table.exp_avg_dtype[t], first, count, vector);
    load_eight(second_place, table.exp_avg_sq_dtype[t], second, count, vector);
    const double beta1 = table.scalars[BETA1].value, beta2 = table.scalars[BETA2].value;
    const T keep = (T)(1.0 - read_scalar(table.scalars[LR]) * table.weight_decay[t]);
    const T scale = (T)read_scalar(table.scalars[GRADIENT_SCALE]), epsilon = (T)table.scalars[EPSILON].value;
    const T weight1 = (T)(1.0 - beta1), decay2 = (T)beta2, weight2 = (T)(1.0 - beta2);
    const T size = (T)table.corrections[2 * t], correction = (T)table.corrections[2 * t + 1];
#pragma unroll
    for (int i = 0; i < EIGHT; ++i) {
        const T g = gradient[i] * scale;
        first[i] = first[i] + weight1 * (g - first[i]);
        second[i] = second[i] * decay2 + weight2 * g * g;
        parameter[i] = parameter[i] * keep - size * first[i] / (root(second[i]) * correction + epsilon);
    }
    store_eight(first, first_place, table.exp_avg_dtype[t], count, vector);
    store_eight(second, second_place, table.exp_avg_sq_dtype[t], count, vector);
    store_eight(parameter, parameter_place, table.parameter_dtype[t], count, vector);
    if (table.working[t])
        store_eight(parameter, (char *)table.working[t] + start * item_size(table.working_dtype[t]), table.working_dtype[t], count, vector);
}

template <class T>
__device__ __forceinline__ void average(const Table &table, int t, int p, int64_t start, int count, bool vector) {
    T parameter[EIGHT]; /* as stored: just written, so it comes from a cache */
    const int from = table.parameter_dtype[t], to = table.average_dtype[p][t];
    load_eight((const char *)table.parameter[t] + start * item_size(from), from, parameter, count, vector);
    AverageStep step;
    step.weight = 1.0 - read_scalar(table.scalars[DECAYS + p]);
    step.stochastic = table.stochastic;
    step.seed = table.seed, step.element = (uint64_t)(table.origin[t] + start);
    step.update = table.stochastic ? (uint32_t)(int64_t)read_scalar(table.scalars[UPDATE]) : 0;
    step.profile = (uint32_t)p;
    follow(parameter, (char *)table.average[p][t] + start * item_size(to), to, count, vector, step);
}

__global__ void __launch_bounds__(THREADS) adamw_ema_kernel(const __grid_constant__ Table table) {
    if (!isfinite(read_scalar(table.scalars[GUARD]))) return;
    int low = 0, high = table.tensors - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.first[middle] <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const int64_t start = (int64_t)(blockIdx.x - table.first[low]) * BLOCK + threadIdx.x * EIGHT;
    if (start >= table.count[low]) return;
    const int count = table.count[low] - start < EIGHT ? (int)(table.count[low] - start) : EIGHT;
    const bool vector = table.vector[low] && count == EIGHT;
    if (table.gradient[low]) {
        if (table.parameter_dtype[low] == FEWSTEP_FLOAT64) adamw<double>(table, low, start, count, vector);
        else adamw<float>(table, low, start, count, vector);
    }
    for (int p = 0; p < table.profiles; ++p) {
        if (table.average_dtype[p][low] == FEWSTEP_FLOAT64) average<double>(table, low, p, start, count, vector);
        else average<float>(table, low, p, start, count, vector);
    }
}

} // namespace

int fewstep_cuda_adamw_ema_step(int64_t tensors, int64_t profiles, const int64_t *cells, const fewstep_scalar *scalars, const int64_t *seed,
                                double *corrections, void *stream) {
    if (tensors < 0 || profiles < 0 || profiles > PROFILES) return 1;
    const int64_t width = ROW + 2 * profiles;
    for (int64_t t = 0; t < tensors; ++t) {
        const Row &row = *(const Row *)(cells + t * width);
        if (row.count < 0 || row.origin % 8 || !known(row.parameter_dtype) || (row.count + BLOCK - 1) / BLOCK > INT32_MAX) return 1;
        if (row.gradient && (!known(row.gradient_dtype) || !known(row.exp_avg_dtype) || !known(row.exp_avg_sq_dtype) || !row.step)) return 1;
        if (row.gradient && row.step_dtype != FEWSTEP_FLOAT32 && row.step_dtype != FEWSTEP_FLOAT64) return 1;
        if (row.working && !known(row.working_dtype)) return 1;
        for (int64_t p = 0; p < profiles; ++p)
            if (!known(cells[t * width + ROW + 2 * p + 1])) return 1;
    }
    for (int64_t t0 = 0; t0 < tensors;) {
        Table table{};
        table.profiles = (int)profiles;
        for (int64_t i = 0; i < DECAYS + profiles; ++i) table.scalars[i] = scalars[i];
        table.corrections = corrections + 2 * t0;
        table.stochastic = seed != nullptr;
        table.seed = seed ? (uint64_t)*seed : 0;
        int64_t blocks = 0;
        int n = 0;
        for (; t0 < tensors && n < TENSORS; ++t0, ++n) {
            const Row &row = *(const Row *)(cells + t0 * width);
            const int64_t more = (row.count + BLOCK - 1) / BLOCK;
            if (blocks + more > INT32_MAX) break;
            double weight_decay;
            memcpy(&weight_decay, &row.weight_decay, 8);
            table.weight_decay[n] = weight_decay;
            table.count[n] = row.count, table.origin[n] = row.origin;
            table.parameter[n] = (void *)row.parameter, table.parameter_dtype[n] = (uint8_t)row.parameter_dtype;
            table.gradient[n] = (const void *)row.gradient, table.gradient_dtype[n] = (uint8_t)row.gradient_dtype;
            table.exp_avg[n] = (void *)row.exp_avg, table.exp_avg_dtype[n] = (uint8_t)row.exp_avg_dtype;
            table.exp_avg_sq[n] = (void *)row.exp_avg_sq, table.exp_avg_sq_dtype[n] = (uint8_t)row.exp_avg_sq_dtype;
            table.step[n] = (void *)row.step, table.step_dtype[n] = (uint8_t)row.step_dtype;
            table.working[n] = (void *)row.working, table.working_dtype[n] = (uint8_t)row.working_dtype;
            int64_t addresses = row.parameter | row.gradient | row.exp_avg | row.exp_avg_sq | row.working;
            for (int64_t p = 0; p < profiles; ++p) {
                const int64_t *cell = cells + t0 * width + ROW + 2 * p;
                table.average[p][n] = (void *)cell[0], table.average_dtype[p][n] = (uint8_t)cell[1];
                addresses |= cell[0];
            }
            table.vector[n] = addresses % 16 == 0;
            table.first[n] = (unsigned)blocks;
            blocks += more;
        }
        table.first[n] = (unsigned)blocks;
        table.tensors = n;
        advance_kernel<<<1, TENSORS, 0, (cudaStream_t)stream>>>(table);
        if (blocks) adamw_ema_kernel<<<(unsigned)blocks, THREADS, 0, (cudaStream_t)stream>>>(table);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return 1000 + (int)error;
    }
    return 0;
}
