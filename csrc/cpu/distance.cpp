/* Per-sample distances and their derivatives: argument checks, threads, and the sum of the partial sums. */
#include "reductions.h"
#include "team.h"
#include <algorithm>
#include <cmath>
#include <vector>

namespace {

const DistanceFunctions &functions = FEWSTEP_CHOOSE(distance_chunk);

const void *place(const fewstep_tensor &x, int64_t b, int64_t start) {
    return x.data ? (const char *)x.data + (b * x.batch_stride + start) * item_size(x.dtype) : nullptr;
}

/* What every chunk shares; false when an argument is outside its range. tensors: a, b, weight and two more. */
bool begin(DistanceChunk &chunk, int64_t kind, double c, int64_t batch, int64_t count, const fewstep_tensor *tensors) {
    if (kind < DISTANCE_SQUARE || kind > DISTANCE_PSEUDO_HUBER || batch < 0 || count < 0) return false;
    chunk = DistanceChunk();
    chunk.kind = (int)kind, chunk.c = c;
    for (int64_t i = 0; i < 5; ++i) {
        if (!known(tensors[i].dtype)) return false;
        chunk.wide |= i < 3 && tensors[i].data && tensors[i].dtype == FEWSTEP_FLOAT64;
    }
    chunk.a_dtype = (int)tensors[0].dtype, chunk.b_dtype = (int)tensors[1].dtype, chunk.weight_dtype = (int)tensors[2].dtype;
    return true;
}

void move(DistanceChunk &chunk, const fewstep_tensor *tensors, int64_t b, int64_t start, int64_t count) {
    chunk.a = place(tensors[0], b, start), chunk.b = place(tensors[1], b, start), chunk.weight = place(tensors[2], b, start);
    chunk.count = std::min(REDUCED, count - start);
}

} // namespace

int fewstep_cpu_distance(int64_t kind, double c, int64_t batch, int64_t count, const fewstep_tensor *tensors, double divisor, double norm,
                         void *out, int64_t out_dtype, int64_t threads) {
    DistanceChunk common;
    if (!begin(common, kind, c, batch, count, tensors)) return 1;
    if (out_dtype != FEWSTEP_FLOAT32 && out_dtype != FEWSTEP_FLOAT64) return 1;
    common.tangent_a_dtype = (int)tensors[3].dtype, common.tangent_b_dtype = (int)tensors[4].dtype;
    const int64_t chunks = (count + REDUCED - 1) / REDUCED;
    std::vector<double> parts(batch * chunks);
    share(batch * chunks, team(batch * count, threads), [&](int64_t first, int64_t last) {
        DistanceChunk chunk = common;
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / chunks, start = i % chunks * REDUCED;
            move(chunk, tensors, b, start, count);
            chunk.tangent_a = place(tensors[3], b, start), chunk.tangent_b = place(tensors[4], b, start);
            parts[i] = functions.sum(chunk);
        }
    });
    for (int64_t b = 0; b < batch; ++b) {
        double total = 0;
        for (int64_t i = 0; i < chunks; ++i) total += parts[b * chunks + i];
        total = norm > 0 ? total / (std::sqrt(total + norm * norm) + norm) : total / divisor;
        if (out_dtype == FEWSTEP_FLOAT64) ((double *)out)[b] = total;
        else ((float *)out)[b] = (float)total;
    }
    return 0;
}

int fewstep_cpu_distance_gradient(int64_t kind, double c, int64_t batch, int64_t count, const fewstep_tensor *tensors, const void *scales,
                                  int64_t scales_dtype, int64_t threads) {
    DistanceChunk common;
    if (!begin(common, kind, c, batch, count, tensors)) return 1;
    if (scales_dtype != FEWSTEP_FLOAT32 && scales_dtype != FEWSTEP_FLOAT64) return 1;
    common.gradient_a_dtype = (int)tensors[3].dtype, common.gradient_b_dtype = (int)tensors[4].dtype;
    const int64_t chunks = (count + REDUCED - 1) / REDUCED;
    share(batch * chunks, team(batch * count, threads), [&](int64_t first, int64_t last) {
        DistanceChunk chunk = common;
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / chunks, start = i % chunks * REDUCED;
            move(chunk, tensors, b, start, count);
            chunk.gradient_a = (void *)place(tensors[3], b, start), chunk.gradient_b = (void *)place(tensors[4], b, start);
            chunk.scale = scales_dtype == FEWSTEP_FLOAT64 ? ((const double *)scales)[b] : (double)((const float *)scales)[b];
            functions.gradient(chunk);
        }
    });
    return 0;
}
