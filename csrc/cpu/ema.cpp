/* fewstep_cpu_ema_update. */
#include "multi_tensor.h"
#include "team.h"
#include <algorithm>
#include <vector>

int fewstep_cpu_ema_update(int64_t tensors, int64_t profiles, const int64_t *table, const fewstep_scalar *decays, const int64_t *seed,
                           const fewstep_scalar *update, int64_t threads) {
    if (tensors < 0 || profiles < 1) return 1;
    const int64_t width = 4 + 2 * profiles;
    std::vector<int64_t> starts(tensors + 1); /* first share of each tensor */
    int64_t elements = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        const int64_t *row = table + t * width;
        if (!known(row[1]) || row[2] < 0 || row[3] % 8) return 1;
        for (int64_t p = 0; p < profiles; ++p)
            if (!known(row[5 + 2 * p])) return 1;
        starts[t + 1] = starts[t] + (row[2] + SHARE - 1) / SHARE;
        elements += row[2];
    }
    std::vector<AverageShare> averages(profiles);
    for (int64_t p = 0; p < profiles; ++p) {
        averages[p].weight = 1.0 - read_scalar(decays[p]);
        averages[p].stochastic = seed != nullptr;
        averages[p].seed = seed ? (uint64_t)*seed : 0;
        averages[p].update = seed ? (uint32_t)(int64_t)read_scalar(*update) : 0;
        averages[p].profile = (uint32_t)p;
    }
    const AverageFunction function = FEWSTEP_CHOOSE(ema_chunk);
    share(starts[tensors], team(elements, threads), [&](int64_t first, int64_t last) {
        int64_t t = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
        for (int64_t i = first; i < last; ++i) {
            while (i >= starts[t + 1]) ++t;
            const int64_t *row = table + t * width, start = (i - starts[t]) * SHARE;
            for (int64_t p = 0; p < profiles; ++p) {
                AverageShare average = averages[p];
                average.data = (char *)row[4 + 2 * p] + start * item_size(row[5 + 2 * p]);
                average.dtype = (int)row[5 + 2 * p];
                average.element = (uint64_t)(row[3] + start);
                function((const char *)row[0] + start * item_size(row[1]), (int)row[1], std::min(SHARE, row[2] - start), average);
            }
        }
    });
    return 0;
}
