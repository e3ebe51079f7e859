/* fewstep_cpu_adamw_ema_step. */
#include "multi_tensor.h"
#include "team.h"
#include <algorithm>
#include <math.h>
#include <string.h>
#include <vector>

namespace {

enum { LR, BETA1, BETA2, EPSILON, GRADIENT_SCALE, GUARD, UPDATE, DECAYS };

struct Row {
    int64_t count, origin, weight_decay, parameter, parameter_dtype, gradient, gradient_dtype, exp_avg, exp_avg_dtype, exp_avg_sq,
        exp_avg_sq_dtype, step, step_dtype, working, working_dtype;
};
constexpr int64_t ROW = sizeof(Row) / sizeof(int64_t);

double advance(const Row &row) {
    return row.step_dtype == FEWSTEP_FLOAT64 ? (*(double *)row.step += 1.0) : (double)(*(float *)row.step += 1.0f);
}

} // namespace

int fewstep_cpu_adamw_ema_step(int64_t tensors, int64_t profiles, const int64_t *table, const fewstep_scalar *scalars, const int64_t *seed,
                               double *corrections, int64_t threads) {
    if (tensors < 0 || profiles < 0 || profiles > MOST_AVERAGES) return 1;
    const int64_t width = ROW + 2 * profiles;
    std::vector<int64_t> starts(tensors + 1);
    int64_t elements = 0;
    for (int64_t t = 0; t < tensors; ++t) {
        const Row &row = *(const Row *)(table + t * width);
        if (row.count < 0 || row.origin % 8 || !known(row.parameter_dtype)) return 1;
        if (row.gradient && (!known(row.gradient_dtype) || !known(row.exp_avg_dtype) || !known(row.exp_avg_sq_dtype) || !row.step)) return 1;
        if (row.gradient && row.step_dtype != FEWSTEP_FLOAT32 && row.step_dtype != FEWSTEP_FLOAT64) return 1;
        if (row.working && !known(row.working_dtype)) return 1;
        for (int64_t p = 0; p < profiles; ++p)
            if (!known(table[t * width + ROW + 2 * p + 1])) return 1;
        starts[t + 1] = starts[t] + (row.count + SHARE - 1) / SHARE;
        elements += row.count;
    }
    if (!isfinite(read_scalar(scalars[GUARD]))) return 0;
    AdamwShare common{};
    const double lr = read_scalar(scalars[LR]);
    common.beta1 = read_scalar(scalars[BETA1]), common.beta2 = read_scalar(scalars[BETA2]), common.epsilon = read_scalar(scalars[EPSILON]);
    common.gradient_scale = read_scalar(scalars[GRADIENT_SCALE]);
    common.averages = profiles;
    for (int64_t p = 0; p < profiles; ++p) {
        AverageShare &average = common.average[p];
        average.weight = 1.0 - read_scalar(scalars[DECAYS + p]);
        average.stochastic = seed != nullptr;
        average.seed = seed ? (uint64_t)*seed : 0;
        average.update = (uint32_t)(int64_t)read_scalar(scalars[UPDATE]);
        average.profile = (uint32_t)p;
    }
    for (int64_t t = 0; t < tensors; ++t) {
        const Row &row = *(const Row *)(table + t * width);
        if (!row.gradient) continue;
        const double step = advance(row);
        corrections[2 * t] = lr / (1.0 - pow(common.beta1, step));
        corrections[2 * t + 1] = 1.0 / sqrt(1.0 - pow(common.beta2, step));
    }
    const AdamwFunction function = FEWSTEP_CHOOSE(adamw_ema_chunk);
    share(starts[tensors], team(elements, threads), [&](int64_t first, int64_t last) {
        int64_t t = std::upper_bound(starts.begin(), starts.end(), first) - starts.begin() - 1;
        for (int64_t i = first; i < last; ++i) {
            while (i >= starts[t + 1]) ++t;
            const Row &row = *(const Row *)(table + t * width);
            const int64_t start = (i - starts[t]) * SHARE;
            const auto place = [&](int64_t address, int64_t dtype) { return address ? (void *)(address + start * item_size(dtype)) : nullptr; };
            AdamwShare part = common;
            double weight_decay;
            memcpy(&weight_decay, &row.weight_decay, 8);
            part.keep = 1.0 - lr * weight_decay;
            part.step_size = corrections[2 * t], part.correction = corrections[2 * t + 1];
            part.count = std::min(SHARE, row.count - start);
            part.parameter = place(row.parameter, row.parameter_dtype), part.parameter_dtype = (int)row.parameter_dtype;
            part.gradient = place(row.gradient, row.gradient_dtype), part.gradient_dtype = (int)row.gradient_dtype;
            part.exp_avg = place(row.exp_avg, row.exp_avg_dtype), part.exp_avg_dtype = (int)row.exp_avg_dtype;
            part.exp_avg_sq = place(row.exp_avg_sq, row.exp_avg_sq_dtype), part.exp_avg_sq_dtype = (int)row.exp_avg_sq_dtype;
            part.working = place(row.working, row.working_dtype), part.working_dtype = (int)row.working_dtype;
            for (int64_t p = 0; p < profiles; ++p) {
                const int64_t *cell = table + t * width + ROW + 2 * p;
                part.average[p].data = place(cell[0], cell[1]), part.average[p].dtype = (int)cell[1];
                part.average[p].element = (uint64_t)(row.origin + start);
            }
            function(part);
        }
    });
    return 0;
}
