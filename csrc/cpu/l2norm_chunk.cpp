/* The sum of squares of one share, in double, in a fixed order. Compiled once for each instruction set with
 * -DFEWSTEP_CHUNK=l2norm_chunk_<name>. */
#include "element.h"
#include "multi_tensor.h"

namespace {

constexpr int LANES = 32;

template <class T>
void add_squares(const T *values, int64_t count, double *lanes) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += (double)values[i + j] * (double)values[i + j];
    for (int j = 0; i < count; ++i, ++j) lanes[j] += (double)values[i] * (double)values[i];
}

double squares(const void *values, int dtype, int64_t count) {
    double lanes[LANES] = {0};
    if (dtype == FEWSTEP_FLOAT32) add_squares((const float *)values, count, lanes);
    else if (dtype == FEWSTEP_FLOAT64) add_squares((const double *)values, count, lanes);
    else {
        float part[TILE];
        for (int64_t start = 0; start < count; start += TILE) {
            const int64_t n = count - start < TILE ? count - start : TILE;
            load((const char *)values + start * item_size(dtype), dtype, part, n);
            add_squares(part, n, lanes);
        }
    }
    double total = 0;
    for (int j = 0; j < LANES; ++j) total += lanes[j];
    return total;
}

} // namespace

extern const SquaresFunction FEWSTEP_CHUNK = squares;
