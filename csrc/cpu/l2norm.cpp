/* fewstep_cpu_multi_tensor_l2norm. */
#include "multi_tensor.h"
#include "team.h"
#include <algorithm>
#include <math.h>
#include <vector>

int fewstep_cpu_multi_tensor_l2norm(int64_t tensors, const int64_t *table, double *partials, void *out, int64_t out_dtype, int64_t threads) {
    if (tensors < 0 || (out_dtype != FEWSTEP_FLOAT32 && out_dtype != FEWSTEP_FLOAT64)) return 1;
    static_assert(SHARE == FEWSTEP_L2NORM_SHARE, "callers size partials by it");
    std::vector<int64_t> starts(tensors + 1);
    int64_t elements = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        const int64_t *row = table + 3 * t;
        if (!known(row[1]) || row[2] < 0) return 1;
        starts[t + 1] = starts[t] + (row[2] + SHARE - 1) / SHARE;
        elements += row[2];
    }
    const SquaresFunction function = FEWSTEP_CHOOSE(l2norm_chunk);
    share(starts[tensors], team(elements, threads), [&](int64_t first, int64_t last) {
        int64_t t = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
        for (int64_t i = first; i < last; ++i) {
            while (i >= starts[t + 1]) ++t;
            const int64_t *row = table + 3 * t, start = (i - starts[t]) * SHARE;
            partials[i] = function((const char *)row[0] + start * item_size(row[1]), (int)row[1], std::min(SHARE, row[2] - start));
        }
    });
    double total = 0;
    for (int64_t i = 0; i < starts[tensors]; ++i) total += partials[i];
    if (out_dtype == FEWSTEP_FLOAT64) *(double *)out = sqrt(total);
    else *(float *)out = (float)sqrt(total);
    return 0;
}
