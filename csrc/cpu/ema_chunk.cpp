/* ema_update's inner loop. Compiled once for each instruction set with -DFEWSTEP_CHUNK=ema_chunk_<name>. */
#include "average.h"

namespace {

void follow_share(const void *parameter, int dtype, int64_t count, const AverageShare &average) {
    if (dtype == FEWSTEP_FLOAT32 && average.dtype == FEWSTEP_FLOAT32) {
        approach((float *)average.data, (const float *)parameter, (float)average.weight, count);
        return;
    }
    for (int64_t start = 0; start < count; start += TILE)
        follow_in_precision(parameter, dtype, start, count - start < TILE ? count - start : TILE, average);
}

} // namespace

extern const AverageFunction FEWSTEP_CHUNK = follow_share;
