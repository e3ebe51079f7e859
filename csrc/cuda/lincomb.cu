/* lincomb and the random numbers on a GPU without Triton's host path. Compiled for sm_80, sm_90 and sm_100; NOT YET RUN on a GPU.
 * Compile with --fmad=false: products and sums round separately and the noise has the CPU's bits. */
#include "element.cuh"
#include "overlap.h"
#include "philox.h"

namespace {

constexpr int MOST_INPUTS = 16, MOST_OUTPUTS = 4;

struct Arguments {
    fewstep_tensor tensors[MOST_INPUTS + MOST_OUTPUTS]; /* inputs, then outputs at MOST_INPUTS */
    fewstep_coefficients coefficients;
    const int64_t *seeds;
    int64_t count, blocks;
    int inputs;
    uint32_t stream;
    bool vector;
};

template <class T>
__device__ __forceinline__ T coefficient(const fewstep_coefficients &c, int64_t at) {
    return c.dtype == FEWSTEP_FLOAT64 ? (T)((const double *)c.data)[at] : (T)((const float *)c.data)[at];
}

__device__ __forceinline__ void normal_eight(uint64_t seed, uint64_t group, uint32_t stream, double *to) {
#pragma unroll
    for (int g = 0; g < EIGHT / 4; ++g) {
        PhiloxWords words = philox(group + g, stream, seed);
        box_muller(words.w[0], words.w[1], &to[4 * g], &to[4 * g + 1]);
        box_muller(words.w[2], words.w[3], &to[4 * g + 2], &to[4 * g + 3]);
    }
}

template <class T, int M, bool NOISE>
__global__ void __launch_bounds__(THREADS) lincomb_kernel(const __grid_constant__ Arguments a) {
    const int64_t b = blockIdx.x / a.blocks, start = (blockIdx.x % a.blocks * THREADS + threadIdx.x) * EIGHT;
    if (start >= a.count) return;
    const int count = a.count - start < EIGHT ? (int)(a.count - start) : EIGHT;
    const bool vector = a.vector && count == EIGHT;
    const int64_t table = b * a.coefficients.batch_stride;
    T total[M][EIGHT];
    for (int k = 0; k < a.inputs + NOISE; ++k) {
        T x[EIGHT];
        if (!NOISE || k < a.inputs) {
            const fewstep_tensor &tensor = a.tensors[k];
            const int dtype = (int)tensor.dtype;
            load_eight((const char *)tensor.data + (b * tensor.batch_stride + start) * item_size(dtype), dtype, x, count, vector);
        } else {
            double noise[EIGHT];
            normal_eight((uint64_t)a.seeds[b], (uint64_t)start / 4, a.stream, noise);
#pragma unroll
            for (int i = 0; i < EIGHT; ++i) x[i] = (T)noise[i];
        }
#pragma unroll
        for (int m = 0; m < M; ++m) {
            const T c = coefficient<T>(a.coefficients, table + m * a.coefficients.row_stride + k * a.coefficients.column_stride);
#pragma unroll
            for (int i = 0; i < EIGHT; ++i) total[m][i] = k == 0 ? c * x[i] : total[m][i] + c * x[i];
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const fewstep_tensor &tensor = a.tensors[MOST_INPUTS + m];
        const int dtype = (int)tensor.dtype;
        store_eight(total[m], (char *)tensor.data + (b * tensor.batch_stride + start) * item_size(dtype), dtype, count, vector);
    }
}

__global__ void __launch_bounds__(THREADS)
draw_kernel(const int64_t *seeds, int64_t count, int64_t blocks, uint32_t stream, char *out, int dtype, int bits, bool vector) {
    const int64_t b = blockIdx.x / blocks, start = (blockIdx.x % blocks * THREADS + threadIdx.x) * EIGHT;
    if (start >= count) return;
    double values[EIGHT];
    if (bits == 0) {
        normal_eight((uint64_t)seeds[b], (uint64_t)start / 4, stream, values);
    } else {
        const double scale = 1.0 / (double)(1ull << bits);
#pragma unroll
        for (int g = 0; g < EIGHT / 4; ++g) {
            PhiloxWords words = philox((uint64_t)start / 4 + g, stream, (uint64_t)seeds[b]);
#pragma unroll
            for (int i = 0; i < 4; ++i) values[4 * g + i] = word_to_double(words.w[i] >> (32 - bits)) * scale;
        }
    }
    const int here = count - start < EIGHT ? (int)(count - start) : EIGHT;
    store_eight(values, out + (b * count + start) * item_size(dtype), dtype, here, vector && here == EIGHT);
}

int draw(const int64_t *seeds, int64_t batch, int64_t count, int64_t noise_stream, void *out, int64_t dtype, int bits, void *stream) {
    if (batch < 0 || count < 0 || noise_stream < 0 || noise_stream > UINT32_MAX || !known(dtype)) return 1;
    const int64_t blocks = (count + THREADS * EIGHT - 1) / (THREADS * EIGHT);
    if (batch * blocks == 0) return 0;
    if (batch * blocks > INT32_MAX) return 1;
    const bool vector = ((int64_t)out | count * item_size((int)dtype)) % 16 == 0;
    draw_kernel<<<(unsigned)(batch * blocks), THREADS, 0, (cudaStream_t)stream>>>(seeds, count, blocks, (uint32_t)noise_stream, (char *)out,
                                                                              (int)dtype, bits, vector);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? 0 : 1000 + (int)error;
}

template <class T, bool NOISE>
void launch(int64_t outputs, unsigned grid, cudaStream_t stream, const Arguments &a) {
    switch (outputs) {
    case 1: lincomb_kernel<T, 1, NOISE><<<grid, THREADS, 0, stream>>>(a); break;
    case 2: lincomb_kernel<T, 2, NOISE><<<grid, THREADS, 0, stream>>>(a); break;
    case 3: lincomb_kernel<T, 3, NOISE><<<grid, THREADS, 0, stream>>>(a); break;
    default: lincomb_kernel<T, 4, NOISE><<<grid, THREADS, 0, stream>>>(a);
    }
}

} // namespace

int fewstep_cuda_lincomb(const fewstep_lincomb *job, void *stream) {
    const int64_t inputs = job->inputs, outputs = job->outputs, batch = job->batch, count = job->count, noise_stream = job->noise_stream;
    const int64_t *const seeds = (const int64_t *)job->seeds;
    const fewstep_tensor *const tensors = job->tensors;
    if (inputs < 1 || inputs > MOST_INPUTS || outputs < 1 || outputs > MOST_OUTPUTS || batch < 0 || count < 0) return 1;
    if (noise_stream < 0 || noise_stream > UINT32_MAX) return 1;
    if (job->coefficients.dtype != FEWSTEP_FLOAT32 && job->coefficients.dtype != FEWSTEP_FLOAT64) return 1;
    if (fewstep_overlaps(*job)) return FEWSTEP_OVERLAP;
    Arguments a{};
    a.coefficients = job->coefficients, a.seeds = seeds, a.count = count, a.inputs = (int)inputs, a.stream = (uint32_t)noise_stream;
    a.blocks = (count + THREADS * EIGHT - 1) / (THREADS * EIGHT);
    a.vector = true;
    bool wide = false;
    for (int64_t i = 0; i < inputs + outputs; ++i) {
        const fewstep_tensor &x = tensors[i];
        if (!known(x.dtype)) return 1;
        a.tensors[i < inputs ? i : MOST_INPUTS + i - inputs] = x;
        a.vector &= (x.data | x.batch_stride * item_size((int)x.dtype)) % 16 == 0;
        wide |= i < inputs && x.dtype == FEWSTEP_FLOAT64;
    }
    if (batch * a.blocks == 0) return 0;
    if (batch * a.blocks > INT32_MAX) return 1;
    const unsigned grid = (unsigned)(batch * a.blocks);
    const auto start = wide ? (seeds ? launch<double, true> : launch<double, false>) : (seeds ? launch<float, true> : launch<float, false>);
    start(outputs, grid, (cudaStream_t)stream, a);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? 0 : 1000 + (int)error;
}

int fewstep_cuda_normal(const int64_t *seeds, int64_t batch, int64_t count, int64_t noise_stream, void *out, int64_t dtype, void *stream) {
    return draw(seeds, batch, count, noise_stream, out, dtype, 0, stream);
}

int fewstep_cuda_uniform(const int64_t *seeds, int64_t batch, int64_t count, int64_t noise_stream, void *out, int64_t dtype, void *stream) {
    const int bits = dtype == FEWSTEP_FLOAT64 ? 32 : dtype == FEWSTEP_FLOAT32 ? 24 : dtype == FEWSTEP_FLOAT16 ? 11 : 8;
    return draw(seeds, batch, count, noise_stream, out, dtype, bits, stream);
}

int fewstep_cuda_abi(void) { return FEWSTEP_ABI; }
