/* Per-sample products and sums: argument checks, threads, and the sum of the partial sums. */
#include "reductions.h"
#include "team.h"
#include <algorithm>
#include <vector>

namespace {

const GramFunction &chunk_function = FEWSTEP_CHOOSE(gram_chunk);

void put(void *out, int64_t dtype, int64_t at, double value) {
    if (dtype == FEWSTEP_FLOAT64) ((double *)out)[at] = value;
    else ((float *)out)[at] = (float)value;
}

} // namespace

int fewstep_cpu_gram(int64_t left, int64_t right, int64_t rows, int64_t batch, int64_t count, const fewstep_tensor *tensors,
                     const double *combinations, void *products, void *sums, void *signed_sums, int64_t out_dtype, int64_t threads) {
    if (left < 1 || left > MOST_ROWS || right < 0 || right > MOST_ROWS || rows < 0 || rows > MOST_ROWS || batch < 0 || count < 0) return 1;
    if (out_dtype != FEWSTEP_FLOAT32 && out_dtype != FEWSTEP_FLOAT64) return 1;
    if (!sums != !signed_sums || (right && (sums || rows) && left != right)) return 1;
    for (int64_t i = 0; i < left + right; ++i)
        if (!known(tensors[i].dtype)) return 1;
    const int64_t m = rows ? rows : left, k = right && !rows ? right : m, chunks = (count + REDUCED - 1) / REDUCED;
    const int64_t results = m * k + (sums ? 2 * m : 0);
    std::vector<double> parts(batch * chunks * results);
    share(batch * chunks, team(batch * count, threads), [&](int64_t first, int64_t last) {
        std::vector<double> room((left + right + 2 * rows) * TILE + RUNNING * results + 8);
        double *scratch = (double *)(((uintptr_t)room.data() + 63) & ~(uintptr_t)63); /* whole cache lines: a vector never straddles two */
        GramChunk chunk;
        chunk.left = left, chunk.right = right, chunk.rows = rows, chunk.combinations = combinations;
        chunk.sums = sums != nullptr, chunk.lanes = scratch, chunk.tiles = scratch + RUNNING * results;
        for (int64_t i = first; i < last; ++i) {
            const int64_t b = i / chunks, start = i % chunks * REDUCED;
            chunk.count = std::min(REDUCED, count - start);
            for (int64_t n = 0; n < left + right; ++n) {
                const fewstep_tensor &x = tensors[n];
                chunk.in[n] = (const char *)x.data + (b * x.batch_stride + start) * item_size(x.dtype);
                chunk.dtype[n] = (int)x.dtype;
            }
            chunk.out = parts.data() + i * results;
            chunk_function(chunk);
        }
    });
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = 0; r < results; ++r) {
            double total = 0;
            for (int64_t c = 0; c < chunks; ++c) total += parts[(b * chunks + c) * results + r];
            if (r < m * k) put(products, out_dtype, b * m * k + r, total);
            else if (r < m * k + m) put(sums, out_dtype, b * m + r - m * k, total);
            else put(signed_sums, out_dtype, b * m + r - m * k - m, total);
        }
    return 0;
}
