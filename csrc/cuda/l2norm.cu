/* multi_tensor_l2norm on a GPU: a partial sum for every FEWSTEP_L2NORM_SHARE elements, then one block adds those in a fixed order.
 * Compiled for sm_80, sm_90 and sm_100; NOT YET RUN on a GPU. */
#include "element.cuh"
#include <algorithm>

namespace {

constexpr int TENSORS = 1024;
constexpr int64_t SHARE = FEWSTEP_L2NORM_SHARE;

struct Table {
    const void *data[TENSORS];
    int64_t count[TENSORS];
    unsigned first[TENSORS + 1]; /* a tensor's first block */
    uint8_t dtype[TENSORS], vector[TENSORS];
    int tensors;
};
static_assert(sizeof(Table) <= 32764, "a kernel's parameters hold at most 32764 bytes");

/* The sum over a block, in an order that depends on its size alone; valid in thread 0. */
__device__ __forceinline__ double block_sum(double value) {
    __shared__ double parts[THREADS];
    parts[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if ((int)threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    return parts[0];
}

__global__ void __launch_bounds__(THREADS) squares_kernel(const __grid_constant__ Table table, double *partials) {
    int low = 0, high = table.tensors - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.first[middle] <= blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const int dtype = table.dtype[low];
    double total = 0;
#pragma unroll
    for (int64_t part = 0; part < SHARE; part += THREADS * EIGHT) {
        const int64_t start = (int64_t)(blockIdx.x - table.first[low]) * SHARE + part + threadIdx.x * EIGHT;
        if (start >= table.count[low]) break;
        const int count = table.count[low] - start < EIGHT ? (int)(table.count[low] - start) : EIGHT;
        double values[EIGHT];
        load_eight((const char *)table.data[low] + start * item_size(dtype), dtype, values, count, table.vector[low] && count == EIGHT);
#pragma unroll
        for (int i = 0; i < EIGHT; ++i) total += values[i] * values[i];
    }
    const double sum = block_sum(total);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(THREADS) finish_kernel(const double *partials, int64_t count, void *out, int dtype) {
    double total = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) total += partials[i];
    const double sum = block_sum(total);
    if (threadIdx.x) return;
    if (dtype == FEWSTEP_FLOAT64) *(double *)out = sqrt(sum);
    else *(float *)out = (float)sqrt(sum);
}

} // namespace

int fewstep_cuda_multi_tensor_l2norm(int64_t tensors, const int64_t *rows, double *partials, void *out, int64_t out_dtype, void *stream) {
    if (tensors < 0 || (out_dtype != FEWSTEP_FLOAT32 && out_dtype != FEWSTEP_FLOAT64)) return 1;
    for (int64_t t = 0; t < tensors; ++t)
        if (!known(rows[3 * t + 1]) || rows[3 * t + 2] < 0 || (rows[3 * t + 2] + SHARE - 1) / SHARE > INT32_MAX) return 1;
    int64_t done = 0;
    for (int64_t t = 0; t < tensors;) {
        Table table{};
        int64_t blocks = 0;
        int n = 0;
        for (; t < tensors && n < TENSORS; ++t, ++n) {
            const int64_t *row = rows + 3 * t;
            const int64_t more = (row[2] + SHARE - 1) / SHARE;
            if (blocks + more > INT32_MAX) break;
            table.data[n] = (const void *)row[0], table.dtype[n] = (uint8_t)row[1], table.count[n] = row[2];
            table.vector[n] = row[0] % 16 == 0;
            table.first[n] = (unsigned)blocks;
            blocks += more;
        }
        table.first[n] = (unsigned)blocks;
        table.tensors = n;
        if (blocks == 0) continue;
        squares_kernel<<<(unsigned)blocks, THREADS, 0, (cudaStream_t)stream>>>(table, partials + done);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return 1000 + (int)error;
        done += blocks;
    }
    finish_kernel<<<1, THREADS, 0, (cudaStream_t)stream>>>(partials, done, out, (int)out_dtype);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? 0 : 1000 + (int)error;
}
