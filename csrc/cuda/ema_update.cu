/* ema_update on a GPU: many tensors and up to four profiles in one launch, the pointer table inside the kernel's parameters.
 * Compiled for sm_80, sm_90 and sm_100; NOT YET RUN on a GPU. */
#include "average.cuh"
#include <algorithm>

namespace {

constexpr int TENSORS = 448, PROFILES = 4; /* per launch: the table fills most of the 32764 bytes a kernel may take */
constexpr int64_t BLOCK = THREADS * EIGHT;

struct Table {
    const void *parameter[TENSORS];
    void *average[PROFILES][TENSORS];
    int64_t count[TENSORS], origin[TENSORS];
    unsigned first[TENSORS + 1]; /* a tensor's first block */
    uint8_t parameter_dtype[TENSORS], average_dtype[PROFILES][TENSORS], vector[TENSORS];
    fewstep_scalar decay[PROFILES], update;
    uint64_t seed;
    int tensors, profiles, first_profile;
    bool stochastic;
};
static_assert(sizeof(Table) <= 32764, "a kernel's parameters hold at most 32764 bytes");

template <class T>
__device__ __forceinline__ void move(const Table &table, int t, int p, int64_t start, int count, bool vector) {
    T parameter[EIGHT];
    const int from = table.parameter_dtype[t], to = table.average_dtype[p][t];
    load_eight((const char *)table.parameter[t] + start * item_size(from), from, parameter, count, vector);
    AverageStep step;
    step.weight = 1.0 - read_scalar(table.decay[p]);
    step.stochastic = table.stochastic;
    step.seed = table.seed, step.element = (uint64_t)(table.origin[t] + start);
    step.update = table.stochastic ? (uint32_t)(int64_t)read_scalar(table.update) : 0;
    step.profile = (uint32_t)(table.first_profile + p);
    follow(parameter, (char *)table.average[p][t] + start * item_size(to), to, count, vector, step);
}

__global__ void __launch_bounds__(THREADS) ema_kernel(const __grid_constant__ Table table) {
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
    for (int p = 0; p < table.profiles; ++p) {
        if (table.average_dtype[p][low] == FEWSTEP_FLOAT64) move<double>(table, low, p, start, count, vector);
        else move<float>(table, low, p, start, count, vector);
    }
}

} // namespace

int fewstep_cuda_ema_update(int64_t tensors, int64_t profiles, const int64_t *rows, const fewstep_scalar *decays, const int64_t *seed,
                            const fewstep_scalar *update, void *stream) {
    if (tensors < 0 || profiles < 1) return 1;
    const int64_t width = 4 + 2 * profiles;
    for (int64_t t = 0; t < tensors; ++t) {
        const int64_t *row = rows + t * width;
        if (!known(row[1]) || row[2] < 0 || row[3] % 8 || (row[2] + BLOCK - 1) / BLOCK > INT32_MAX) return 1;
        for (int64_t p = 0; p < profiles; ++p)
            if (!known(row[5 + 2 * p])) return 1;
    }
    for (int64_t p0 = 0; p0 < profiles; p0 += PROFILES) {
        for (int64_t t0 = 0; t0 < tensors;) {
            Table table{};
            table.profiles = (int)std::min<int64_t>(PROFILES, profiles - p0);
            for (int p = 0; p < table.profiles; ++p) table.decay[p] = decays[p0 + p];
            table.first_profile = (int)p0;
            table.stochastic = seed != nullptr;
            if (seed) table.seed = (uint64_t)*seed, table.update = *update;
            int64_t blocks = 0;
            int n = 0;
            for (; t0 < tensors && n < TENSORS; ++t0, ++n) {
                const int64_t *row = rows + t0 * width;
                const int64_t more = (row[2] + BLOCK - 1) / BLOCK;
                if (blocks + more > INT32_MAX) break;
                int64_t addresses = row[0];
                table.parameter[n] = (const void *)row[0];
                table.parameter_dtype[n] = (uint8_t)row[1];
                table.count[n] = row[2], table.origin[n] = row[3];
                for (int p = 0; p < table.profiles; ++p) {
                    const int64_t *average = row + 4 + 2 * (p0 + p);
                    addresses |= average[0];
                    table.average[p][n] = (void *)average[0];
                    table.average_dtype[p][n] = (uint8_t)average[1];
                }
                table.vector[n] = addresses % 16 == 0;
                table.first[n] = (unsigned)blocks;
                blocks += more;
            }
            table.first[n] = (unsigned)blocks;
            table.tensors = n;
            if (blocks == 0) continue;
            ema_kernel<<<(unsigned)blocks, THREADS, 0, (cudaStream_t)stream>>>(table);
            const cudaError_t error = cudaGetLastError();
            if (error != cudaSuccess) return 1000 + (int)error;
        }
    }
    return 0;
}
